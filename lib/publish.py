"""Push a finished run to the Hugging Face hub, as --push_to_hub does at its end.

    python -m lib.publish outputs/mrpc [--hub_model_id USER/NAME] [--hub_private]

Uploads the model, its tokenizer, the model card, the report and the scores, in one commit. Flags
that are not given are those of the run. The token is that of HF_TOKEN or of `hf auth login`.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from lib.checkpoints.run_folder import read_config
from lib.errors import InputError, PublishError
from lib.hub.upload import push


def main(arguments: Sequence[str]) -> int:
    """Push, and return the exit status: 2 if there is nothing to push, 1 if the hub failed."""
    parser = argparse.ArgumentParser(
        prog="python -m lib.publish",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.add_argument("folder", type=Path, metavar="OUTPUT_DIR", help="folder of a finished run")
    parser.add_argument("--hub_model_id", metavar="USER/NAME", help="repository on the hub")
    parser.add_argument("--hub_private", action="store_true", help="make a new one private")
    parser.add_argument("--hub_revision", metavar="BRANCH", help="branch to commit to")
    parser.add_argument("--hub_create_pr", action="store_true", help="open a pull request instead")
    given = vars(parser.parse_args(arguments))
    folder = given.pop("folder")
    names = ("hub_model_id", "hub_private", "hub_revision", "hub_create_pr")
    try:
        config = read_config(folder) or {}
        of_the_run = {name: config[name] for name in names if config.get(name)}
        print(push(folder, **{**of_the_run, **given}))
    except (InputError, PublishError) as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 2 if isinstance(error, InputError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
