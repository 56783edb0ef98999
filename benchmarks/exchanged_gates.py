"""Does a gated network look at the image, or does it read the class from the gates?

python benchmarks/exchanged_gates.py --data cifar10.npz RUN...

Each RUN is a run directory of a gated network. Its backbone sees the test images under their own gates, with each gate
as it is for most of them, and under the gates of other images, of the same class and of another one; see
`gaternet.forcing.Exchanged`.
Writes docs/results/exchanged_gates.json.
"""

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

from measured_runs import measure_runs
from tables import RESULTS

from gaternet.evaluate import BATCH
from gaternet.forcing import exchange_gates
from gaternet.loader import make_batches
from gaternet.machine import make_accelerator
from gaternet.modes import channels_last_
from gaternet.recipe import Runtime
from gaternet.trained import Trained

RESULT = RESULTS / "exchanged_gates.json"


def main() -> None:
    """Measure all that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--data", required=True)
    args = parser.parse_args()
    runtime = Runtime(precision="no")
    accelerator = make_accelerator(runtime)

    def measure(run: Path) -> dict[str, Any]:
        model = Trained.open_gated(run, data=args.data)
        channels_last_(model.network.to(accelerator.device))
        _, images = model.load_sets()
        batches = make_batches(images, BATCH, runtime, accelerator).epoch()
        found = exchange_gates(model.network, batches, preprocessing=model.preprocessing, images=len(images))
        return {"images": len(images), "epochs": model.metadata["trained"]["epochs"], **asdict(found)}

    command = f"python benchmarks/exchanged_gates.py --data {Path(args.data).name} RUN..."
    measure_runs(args.runs, RESULT, command, measure)


if __name__ == "__main__":
    main()
