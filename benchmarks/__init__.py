"""What longnet costs, measured: ``python -m benchmarks`` from the root of a checkout.

No number without a green check: everything that is timed is first compared with the float64 definition.
"""

import sys
from pathlib import Path

# A result names the commit of this checkout, so its sources are measured, whatever is installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))
