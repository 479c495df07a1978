"""Bytes between sites: a content-addressed storage in a folder, an S3-compatible service or behind HTTP; copies of folders from
it that go on where they were cut; and who does so for the tasks of a board (`Stager`).  What is moved is decided in `staging`."""

from qipan.transfer.fetch import Progress, fetch
from qipan.transfer.stager import Stager
from qipan.transfer.storage import ContentStorage, open_storage

__all__ = ["ContentStorage", "Progress", "Stager", "fetch", "open_storage"]
