"""The data set on the command line.

python -m minires.cifar10 download [DIR]     bring the files into DIR, by default $MINIRES_DATA or ~/.cache/minires
python -m minires.cifar10 verify [DIR]       tell whether the files there are right, byte for byte
"""

import argparse
import os
import sys

from minires.cifar10 import DataError, DownloadError, default_directory
from minires.cifar10.files import download, verify
from minires.console import note, printable


def main(arguments=None):
    parser = argparse.ArgumentParser(
        prog="python -m minires.cifar10", description="Download CIFAR-10, or verify it.", allow_abbrev=False
    )
    parser.add_argument("command", choices=["download", "verify"])
    parser.add_argument("directory", nargs="?", metavar="DIR", help="default $MINIRES_DATA or ~/.cache/minires")
    parser.add_argument("--debug", action="store_true", help="show where in the program an error comes from")
    args = parser.parse_intermixed_args(arguments)  # the other one takes DIR for given once it meets an option
    command = {"download": download, "verify": verify}[args.command]
    try:
        place = command(os.path.expanduser(args.directory) if args.directory else default_directory())
        print(printable(f"{place}: the six files are right, byte for byte", sys.stdout))
        return 0
    except (DataError, DownloadError) as error:
        if args.debug:
            raise
        note(f"error: {error}")
        return 2 if isinstance(error, DataError) else 1
    except KeyboardInterrupt:
        note("\ninterrupted; the same command continues with what has arrived")
        return 130


if __name__ == "__main__":
    sys.exit(main())
