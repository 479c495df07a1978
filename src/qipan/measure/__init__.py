"""What a node's devices really do: asked for work rather than for names, all at once, checked, signed, with an expiry."""

from qipan.measure.challenge import Challenge, check
from qipan.measure.judge import Claim, Verdict, judge
from qipan.measure.record import Measurement, read_record, write_record

__all__ = ["Challenge", "Claim", "Measurement", "Verdict", "check", "judge", "read_record", "write_record"]
