"""A measurement as a signed file that expires.  Ed25519; the key is this user's and is made at the first record."""

from dataclasses import dataclass, field
from pathlib import Path

import msgspec
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from qipan.errors import InvalidInput, NotFound
from qipan.files import secret_in, write_whole

VALID_S = 30 * 86400.0


@dataclass(frozen=True, slots=True)
class Measurement:
    """Rates are of one device while all of the node work.  `gemm_flops_per_s`: precision -> size -> rate; `filled_bytes` were
    written and read back right; 0.0: not measured.  `host` names the node, as the operating system does."""

    chip_class: str
    torch_device: str
    devices: int
    host: str
    measured_at_s: float
    expires_at_s: float
    gemm_flops_per_s: dict[str, dict[int, float]]
    memory_bytes_per_s: float
    filled_bytes: int
    collective_bytes_per_s: float = 0.0
    collective_latency_s: float = 0.0
    storage_write_bytes_per_s: float = 0.0
    storage_read_bytes_per_s: float = 0.0
    challenge_flops_per_s: float = 0.0
    spread: float = 0.0
    real_devices: float = 0.0
    holds: bool = True
    reasons: tuple[str, ...] = ()
    facts: dict[str, str] = field(default_factory=dict)  # torch version, device name, ...

    def best_flops_per_s(self) -> dict[str, float]:
        """precision -> rate of the size at which it was best."""
        return {precision: max(rates.values()) for precision, rates in self.gemm_flops_per_s.items() if rates}


@dataclass(frozen=True, slots=True)
class Signed:
    body: Measurement
    key: str  # hex of the public key
    signature: str


def write_record(body: Measurement, folder: Path) -> Path:
    """Sign and keep it; one per chip class and host, the newest."""
    key = own_key(folder)
    signed = Signed(body, public_hex(key), key.sign(_bytes(body)).hex())
    name = "".join(c if c.isalnum() or c in ".-" else "_" for c in f"{body.chip_class}@{body.host}")
    path = folder / f"{name}.json"
    write_whole(path, msgspec.json.format(msgspec.json.encode(signed), indent=1) + b"\n", 0o644)
    return path


def read_record(path: Path, trusted: frozenset[str], now_s: float) -> Measurement:
    """Raises NotFound, InvalidInput: not a record, signed by a key that is not in `trusted`, changed since, or expired."""
    if not path.is_file():
        raise NotFound(f"{path}: no such record; `qipan chips measure` makes one")
    try:
        signed = msgspec.json.decode(path.read_bytes(), type=Signed)
    except msgspec.MsgspecError as error:
        raise InvalidInput(f"is no record of a measurement: {error}", str(path)) from None
    if signed.key not in trusted:
        raise InvalidInput(
            f"is signed by {signed.key[:16]}..., which is not trusted here; measure again", str(path)
        )
    try:
        Ed25519PublicKey.from_public_bytes(bytes.fromhex(signed.key)).verify(
            bytes.fromhex(signed.signature), _bytes(signed.body)
        )
    except (InvalidSignature, ValueError):
        raise InvalidInput("was changed after it was signed; measure again", str(path)) from None
    if signed.body.expires_at_s <= now_s:
        days = (now_s - signed.body.expires_at_s) / 86400
        raise InvalidInput(f"expired {days:.1f} days ago; run `qipan chips measure` again", str(path))
    return signed.body


def own_key(folder: Path) -> Ed25519PrivateKey:
    folder.mkdir(parents=True, exist_ok=True)
    body = secret_in(folder / "measure.key", lambda: Ed25519PrivateKey.generate().private_bytes_raw())
    return Ed25519PrivateKey.from_private_bytes(body)


def public_hex(key: Ed25519PrivateKey) -> str:
    return key.public_key().public_bytes_raw().hex()


def _bytes(body: Measurement) -> bytes:
    return msgspec.json.encode(msgspec.to_builtins(body, str_keys=True), order="deterministic")
