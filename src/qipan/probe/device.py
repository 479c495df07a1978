"""One device as its vendor's tool names it."""

from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class Device:
    """`name`, `bus` and `uuid` are empty and `memory_bytes` is 0 where the tool gave none.  `index` is the number that
    the vendor's visible-devices variable takes; `card` is the package it sits on.  `cores`: parts of it that a framework counts
    apart (Neuron).  `complaints` say why it is not healthy."""

    index: int
    name: str
    bus: str = ""
    memory_bytes: int = 0
    complaints: tuple[str, ...] = ()
    uuid: str = ""
    card: int = -1
    cores: int = 1
    chip_class: str = ""

    @property
    def healthy(self) -> bool:
        return not self.complaints

    @property
    def key(self) -> tuple[object, ...]:
        """What tells one device from another in one tool's text; a masked bus address (0000:xx:00.0) does not."""
        return (self.bus.lower(),) if self.bus and "x" not in self.bus.lower() else (self.index, self.card)

    def filled(self, other: "Device") -> "Device":
        """With what another of the vendor's commands said of the same device."""
        return replace(
            self, name=self.name or other.name, bus=self.bus or other.bus, uuid=self.uuid or other.uuid,
            memory_bytes=self.memory_bytes or other.memory_bytes, cores=max(self.cores, other.cores),
            complaints=self.complaints + tuple(c for c in other.complaints if c not in self.complaints),
        )  # fmt: skip
