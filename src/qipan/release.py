"""Which release this is: ticks and backups name it."""

RELEASE = "0.1.0"
