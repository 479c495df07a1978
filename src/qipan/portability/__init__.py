"""Is a training script portable to another vendor's chip: what runs as it is, what is rewritten, what blocks, by line; then a trial
of two steps whose losses are compared with the original's."""

from qipan.portability.check import Checked, check_script
from qipan.portability.findings import Finding

__all__ = ["Checked", "Finding", "check_script"]
