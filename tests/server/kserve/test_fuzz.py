"""Random v2 requests: whatever comes, the answer is below 500 and an error of this protocol, and the next request is answered."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from phalanx.runtime.server.kserve.contract import MODELS
from tests.server.servers import Answer, Server

COMMON = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20)
JSON = st.recursive(
    SCALARS,
    lambda children: st.lists(children, max_size=4) | st.dictionaries(st.text(max_size=8), children, max_size=4),
    max_leaves=8,
)
MODEL_NAMES = st.sampled_from(sorted(MODELS))
INPUTS = sorted({spec.name for model in MODELS.values() for spec in model.inputs})
DATATYPES = st.sampled_from(["BYTES", "INT32", "UINT32", "INT64", "UINT64", "FP32", "FP64", "BOOL", "BF16", "X"])
SMALL = {"text_input": "ab", "max_tokens": 2}


def check(server: Server, answer: Answer) -> None:
    assert answer.status < 500 or answer.status in (501, 503), answer.body
    if answer.status != 200:
        assert isinstance(answer.json["error"], str)
    assert server.post("/v2/models/ensemble/generate", SMALL).json["text_output"] == "abab"


@COMMON
@given(
    route=st.sampled_from(["generate", "generate_stream"]),
    fields=st.dictionaries(
        st.sampled_from([*INPUTS, "parameters", "id", "min_length"]) | st.text(max_size=9), JSON, max_size=4
    ),
)
def test_generate(server: Server, route: str, fields: dict[str, Any]) -> None:
    check(server, server.post(f"/v2/models/ensemble/{route}", {**SMALL, **fields}))


@COMMON
@given(model=MODEL_NAMES, data=st.data())
def test_infer_with_inputs_of_the_model(server: Server, model: str, data: st.DataObject) -> None:
    names = data.draw(st.lists(st.sampled_from([spec.name for spec in MODELS[model].inputs]), unique=True))
    required = [spec.name for spec in MODELS[model].inputs if not spec.optional]
    rows = data.draw(st.integers(0, 2))
    inputs = []
    for spec in MODELS[model].inputs:
        if spec.name in names or spec.name in required:
            datatype = data.draw(st.just(spec.datatype) | DATATYPES)
            shape = [rows, *(data.draw(st.integers(0, 2)) if extent < 0 else extent for extent in spec.shape)]
            count = 1
            for extent in shape:
                count *= extent
            values = {"BYTES": st.text(max_size=5), "BOOL": st.booleans(), "FP32": st.floats(width=32, allow_nan=False)}
            value = values.get(datatype, st.integers(-2, 40))
            content = data.draw(st.lists(value, min_size=count, max_size=count))
            inputs.append({"name": spec.name, "datatype": datatype, "shape": shape, "data": content})
    check(server, server.post(f"/v2/models/{model}/infer", {"inputs": inputs}))


@COMMON
@given(body=st.binary(max_size=80) | JSON.map(lambda value: json.dumps(value).encode()), length=st.integers(-2, 90))
def test_infer_with_anything(server: Server, body: bytes, length: int) -> None:
    headers = {"Inference-Header-Content-Length": str(length)} if length > -2 else {}
    check(server, server.request("POST", "/v2/models/ensemble/infer", body, headers))
