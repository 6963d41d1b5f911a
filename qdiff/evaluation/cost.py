"""What a model takes: bytes on disk, and bytes its float form would take."""

from pathlib import Path

from torch import nn

FLOAT_BYTES = 4  # float32


def stored_bytes(path: Path | str) -> int:
    """Bytes of a file, or of all files in a folder and below. Raises FileNotFoundError where path is neither."""
    path = Path(path)
    if path.is_file():
        return path.stat().st_size
    if path.is_dir():
        return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    raise FileNotFoundError(f"{path}: expected a file or a folder, found nothing")


def float_bytes(network: nn.Module) -> int:
    """4 bytes for each parameter of a float network, a shared one counted once; buffers are left out."""
    return FLOAT_BYTES * sum(parameter.numel() for parameter in network.parameters())
