#!/usr/bin/env python3
"""Makes the built-in price snapshot out of LiteLLM's price map.

    ops/prices.py litellm-1.80.0-py3-none-any.whl > router/core/src/price/litellm-1.80.0-2025-11.json

SOURCE is a litellm wheel (read as a zip file, never installed) or the map itself as JSON. Only facts that the router
uses are kept: the ids of models that answer text and their prices per token, as the source writes them. Left out are
models without both prices, with price 0 (nothing is free unless the operator says so) and above 1,000 USD per million
tokens (slips of units). A new snapshot has a new file name; `price.rs` names it.
"""
import json
import sys
import zipfile
from decimal import Decimal

MAP = "litellm/model_prices_and_context_window_backup.json"
MODES = {"chat", "completion", "responses"}
IN, OUT, THINK = "input_cost_per_token", "output_cost_per_token", "output_cost_per_reasoning_token"
PER_TOKEN_MAX = Decimal("0.001")


def main(source: str) -> None:
    if zipfile.is_zipfile(source):
        with zipfile.ZipFile(source) as wheel:
            text = wheel.read(MAP)
    else:
        with open(source, "rb") as file:
            text = file.read()
    models = json.loads(text, parse_float=str, parse_int=str)
    lines, left_out = [], {"other mode": 0, "no price": 0, "free": 0, "implausible": 0}
    for model, entry in sorted(models.items()):
        if model == "sample_spec" or entry.get("mode") not in MODES:
            left_out["other mode"] += 1
        elif entry.get(IN) is None or entry.get(OUT) is None:
            left_out["no price"] += 1
        elif Decimal(entry[IN]) == 0 and Decimal(entry[OUT]) == 0:
            left_out["free"] += 1
        elif max(Decimal(entry[IN]), Decimal(entry[OUT])) > PER_TOKEN_MAX:
            left_out["implausible"] += 1
        else:
            fields = [IN, OUT]
            if entry.get(THINK) is not None and Decimal(entry[THINK]) > Decimal(entry[OUT]):
                fields.append(THINK)
            prices = ",".join(f'"{field}":{entry[field]}' for field in fields)
            lines.append(f"{json.dumps(model)}:{{{prices}}}")
    print("{\n" + ",\n".join(lines) + "\n}")
    print(f"{len(lines)} models; left out: {left_out}", file=sys.stderr)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: ops/prices.py SOURCE > SNAPSHOT (SOURCE: a litellm wheel or its price map as JSON)")
    main(sys.argv[1])
