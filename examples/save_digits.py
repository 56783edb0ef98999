"""Write one test image of each embedded digit as a PNG file, to try `gaternet predict` on.

python examples/save_digits.py FOLDER
"""

import sys
from pathlib import Path

from PIL import Image

from gaternet.data import load_data


def main() -> None:
    """Save ten images under the folder that the command line names."""
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    test = load_data("digits").test
    for digit in range(10):
        pixels, _ = test[list(test.labels).index(digit)]
        Image.fromarray(pixels[0].numpy()).save(folder / f"{digit}.png")


if __name__ == "__main__":
    main()
