"""FineWeb's sample of 10 billion tokens, in GPT-2's byte-pair encoding."""

from openwebtext import Web, prepare

import config


def main(cfg: Web, origin: dict[str, str]) -> None:
    """Make the data set fineweb: its sample of 10 billion tokens, 20 GB, downloaded as it goes."""
    prepare("fineweb", cfg, origin, "HuggingFaceFW/fineweb", "sample-10BT")


if __name__ == "__main__":
    config.run(main, Web)
