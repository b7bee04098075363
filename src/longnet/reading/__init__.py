"""Read any amount of bytes through a trained model: source, loop, record and saved state.

Needs what ``longnet.training`` needs; ``import longnet`` does not import this package.
"""

import sys
from typing import TYPE_CHECKING

# As in longnet.training.
if TYPE_CHECKING or "torch" in sys.modules:
    from longnet.reading.folder import read_settings
    from longnet.reading.loop import stream
    from longnet.reading.settings import StreamSettings
    from longnet.reading.table import StreamResult, format_table

__all__ = ["StreamResult", "StreamSettings", "format_table", "read_settings", "stream"]
