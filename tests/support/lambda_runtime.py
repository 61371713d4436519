"""A Lambda function of the counted app under Mangum: an event a line on standard input, a status a line on output."""

from __future__ import annotations

import json
import os
import sys

from mangum import Mangum

from support.counted_app import app


def main() -> None:
    handler = Mangum(app, lifespan=os.environ["LIFESPAN"])
    for line in sys.stdin:
        answer = handler(json.loads(line), object())
        sys.stdout.write(f"{answer['statusCode']}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
