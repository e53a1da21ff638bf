"""LiteLLM and OpenAI's Agents SDK, from a separate environment, against a whole job: ``make test-agents`` installs them and runs this."""

from __future__ import annotations

import json
import os
import subprocess

import pytest

from .jobs import Job
from .test_clients import MODEL, job

__all__ = ["job"]

LITELLM = """
import json, sys
import litellm
url, model = sys.argv[1:]
ask = {"messages": [{"role": "user", "content": "What are you?"}], "max_tokens": 6, "api_key": "none", "num_retries": 0, "temperature": 0}
answers = {}
for provider, base in (("openai", url + "/v1"), ("hosted_vllm", url + "/v1"), ("anthropic", url)):
    name = provider + "/" + model
    whole = litellm.completion(model=name, api_base=base, **ask)
    chunks = list(litellm.completion(model=name, api_base=base, stream=True, **ask))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    answers[provider] = [whole.choices[0].message.content, text, whole.usage.completion_tokens]
print(json.dumps(answers))
"""
AGENTS = """
import asyncio, json, sys
from agents import Agent, ModelSettings, OpenAIChatCompletionsModel, OpenAIResponsesModel, Runner, function_tool, set_tracing_disabled
from openai import AsyncOpenAI
from pydantic import BaseModel
url, name = sys.argv[1:]
set_tracing_disabled(True)
client = AsyncOpenAI(base_url=url + "/v1", api_key="none", max_retries=0)

@function_tool
def weather(city: str) -> str:
    return "Rain in " + city

class Trip(BaseModel):
    days: int

async def run(model, question, **options):
    agent = Agent(name="a", instructions="Be brief.", model=model(name, client), **options)
    return (await Runner.run(agent, question, max_turns=2)).final_output

async def main():
    chat, typed = OpenAIChatCompletionsModel, {"output_type": Trip, "model_settings": ModelSettings(max_tokens=200)}
    free = await run(chat, "Is it raining?", tools=[weather], model_settings=ModelSettings(max_tokens=8))
    trips = [await run(model, "How long?", **typed) for model in (chat, lambda *names: OpenAIResponsesModel(*names))]
    both = {**typed, "tools": [weather], "tool_use_behavior": "stop_on_first_tool"}
    ends = [await run(chat, question, **both) for question in ("How long?", "Is it raining?")]
    said = [end.days if isinstance(end, Trip) else str(end).startswith("Rain in ") for end in ends]
    print(json.dumps([free, *(trip.days for trip in trips), *said]))

asyncio.run(main())
"""


def said(job: Job, program: str) -> object:
    """What a program of the other environment prints last, as JSON."""
    python = os.environ.get("PHALANX_AGENTS_PYTHON")
    if python is None:
        pytest.skip("slow; run by make test-agents")
    command = [python, "-c", program, job.server.url, MODEL]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_litellm_gets_the_same_answer_through_every_provider(job: Job) -> None:
    answers = said(job, LITELLM)
    assert isinstance(answers, dict)
    (text,) = {whole for whole, _, _ in answers.values()}
    assert text
    assert set(map(tuple, answers.values())) == {(text, text, 6)}


@pytest.mark.slow
def test_agents_have_strict_tools_and_typed_outputs(job: Job) -> None:
    answer = said(job, AGENTS)
    assert isinstance(answer, list)
    assert isinstance(answer[0], str)
    assert len(answer) == 5
    assert all(isinstance(days, int) and days is not False for days in answer[1:]), "an output, or a call's"
