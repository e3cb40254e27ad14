"""What clusters need to run and watch Gristmill: files for Slurm, Kubernetes, Docker and Prometheus."""
