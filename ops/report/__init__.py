"""The run as one HTML page: `write_report(run_dir)`, from the run folder alone, at any time, finished or not.

The page is self-contained: inline SVG of our own, inline PNG, no script, no network; it opens from file://. Reading
order: folder (what there is) -> charts, pictures, tables (what is shown) -> page. The two picture files that training
leaves for it have their format, writer and reader in crops and neighbours.
"""

from .page import write_report

__all__ = ["write_report"]
