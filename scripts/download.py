"""Fetch a model from the Hugging Face hub into its cache and print where it lies.

python scripts/download.py meta-llama/Llama-3.2-1B-Instruct [--revision R] [--token T] [--debug]
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import convert_hf_checkpoint as convert


def fetch(repo: str, revision: str | None, token: str | None) -> Path:
    """Where it lies. ValueError: a name that is none, too."""
    from huggingface_hub.errors import HFValidationError

    try:
        return convert.download(repo, revision, token)
    except HFValidationError:
        raise ValueError(f"repo: found {repo!r}, expected owner/model") from None


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("repo", help="owner/model")
    parser.add_argument("--revision", help="a branch, tag or commit")
    parser.add_argument("--token", help="of an account that may read it; HF_TOKEN otherwise")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    args = parser.parse_args(convert.underscored(sys.argv[1:] if argv is None else argv))
    return convert.report_errors(lambda: print(fetch(args.repo, args.revision, args.token)), args.debug)


if __name__ == "__main__":
    sys.exit(main())
