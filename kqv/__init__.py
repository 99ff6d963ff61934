"""What the commands are made of: one job a file. Nothing here imports a command, or model.py."""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent  # the checkout: configs/, data/, prepare/
