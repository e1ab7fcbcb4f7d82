"""Pictures within a page, which is then one file and needs no network."""

import base64
from pathlib import Path

__all__ = ["data_url"]


def data_url(file: Path) -> str:
    """A PNG file as the address of an image.

    :param file: the picture
    :return: ``data:image/png;base64,…``
    """
    return "data:image/png;base64," + base64.b64encode(file.read_bytes()).decode("ascii")
