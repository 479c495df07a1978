"""Qipan (棋盘): many data centres full of unlike AI chips, as one supply."""

__version__ = "0.1.0"
