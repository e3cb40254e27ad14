"""The releases that Gristmill is tested with: those of constraints.txt on which it builds (a test ties them)."""

PYTHON = (3, 11)
CUDA = 13  # what torch and DALI are built for
DRIVER = "580"  # the first branch of drivers that serves it
TESTED = {
    "aiohttp": "3.14.5",
    "braceexpand": "0.1.7",
    "click": "8.5.1",
    "deepspeed": "0.19.8",
    "isal": "1.9.1",
    "llvmlite": "0.50.0",
    "numba": "0.68.1",
    "numpy": "2.4.6",
    "nvidia-dali-cuda130": "2.4.0",
    "nvidia-nccl-cu13": "2.30.7",
    "nvidia-nvimgcodec-cu13": "0.9.0.20",
    "opencv-python-headless": "5.0.0.93",
    "pillow": "13.0.0",
    "prometheus_client": "0.26.0",
    "pyarrow": "26.0.1",
    "pydantic": "2.14.3",
    "PyYAML": "6.0.3",
    "rich": "15.0.0",
    "safetensors": "0.8.0",
    "simplejpeg": "1.9.0",
    "timm": "1.0.31",
    "torch": "2.14.1",
    "torchvision": "0.29.1",
    "webdataset": "1.0.2",
    "yarl": "1.25.1",
}
