"""Where a board keeps what it was told and what it decided: SQLite or PostgreSQL behind one interface."""

from qipan.store.board import Store
from qipan.store.database import Database
from qipan.store.facts import StoredFact, StoredTick
from qipan.store.folder import StoreFolder
from qipan.store.opening import SCHEMA, Place

__all__ = ["SCHEMA", "Database", "Place", "Store", "StoreFolder", "StoredFact", "StoredTick"]
