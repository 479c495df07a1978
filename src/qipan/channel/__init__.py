"""Between boards there are only bytes.  `link` makes frames arrive once and in order over any `Carrier`; `network` is
the carrier between processes."""

from qipan.channel.link import Carrier, FaultyCarrier, Frame, Link, PairedCarrier, carrier_pair

__all__ = ["Carrier", "FaultyCarrier", "Frame", "Link", "PairedCarrier", "carrier_pair"]
