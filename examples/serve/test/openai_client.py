"""The official Python client against a running server: URL in the first argument."""
import sys

import openai

client = openai.OpenAI(base_url=sys.argv[1] + "/v1", api_key=sys.argv[2], max_retries=0, timeout=60)
MODEL = "tales-silu"
SAID = [{"role": "user", "content": "Who is the king?"}]


def refused(kind, **request):
    try:
        client.chat.completions.create(**{"model": MODEL, "messages": SAID, **request})
    except kind as error:
        assert error.body["message"], error
        return error
    raise AssertionError(f"not refused: {request}")


def ask(**more):
    return client.chat.completions.create(model=MODEL, messages=SAID, seed=7, max_completion_tokens=20, **more)


assert [model.id for model in client.models.list()] == [MODEL]
assert client.models.retrieve(MODEL).object == "model"

answer = ask()
text = answer.choices[0].message.content
assert text and answer.choices[0].message.role == "assistant" and answer.usage.completion_tokens == 20, answer
assert answer.choices[0].finish_reason == "length"
assert ask().choices[0].message.content == text
assert ask().usage.prompt_tokens_details.cached_tokens >= 0

pieces = list(ask(stream=True, stream_options={"include_usage": True}))
assert "".join(p.choices[0].delta.content or "" for p in pieces if p.choices) == text
assert pieces[0].choices[0].delta.role == "assistant" and pieces[-1].usage.completion_tokens == 20
assert len(pieces) > 10, "a stream in one piece is none"

several = ask(n=3)
assert [choice.index for choice in several.choices] == [0, 1, 2]
assert several.choices[0].message.content == text != several.choices[1].message.content

stop = text[9:14]
stopped = ask(stop=[stop])
assert stopped.choices[0].message.content == text[: text.index(stop)], (text, stop, stopped)
assert stopped.choices[0].finish_reason == "stop"

told = ask(logprobs=True, top_logprobs=4, temperature=0).choices[0].logprobs.content
assert len(told) == 20 and all(len(entry.top_logprobs) == 4 for entry in told)
assert all(entry.logprob == entry.top_logprobs[0].logprob <= 0 for entry in told)

# The answer goes back as it came.
more = client.chat.completions.create(
    model=MODEL, max_tokens=5, messages=[*SAID, answer.choices[0].message, {"role": "user", "content": "And she?"}]
)
assert more.usage.prompt_tokens > answer.usage.prompt_tokens

tale = client.completions.create(model=MODEL, prompt="The sea", seed=3, max_tokens=12, logprobs=1)
assert len(tale.choices[0].logprobs.tokens) == 12
pieces = client.completions.create(model=MODEL, prompt="The sea", seed=3, max_tokens=12, stream=True)
assert "".join(piece.choices[0].text for piece in pieces) == tale.choices[0].text
both = client.completions.create(model=MODEL, prompt=["The sea", "The wolf"], seed=3, max_tokens=12)
assert len(both.choices) == 2 and both.choices[0].text == tale.choices[0].text

assert refused(openai.NotFoundError, model="gpt-4").code == "model_not_found"
assert refused(openai.BadRequestError, tools=[{"type": "function", "function": {"name": "f"}}]).param == "tools"
assert refused(openai.BadRequestError, response_format={"type": "json_object"}).param == "response_format"
assert refused(openai.BadRequestError, temperature=-1).param == "temperature"
assert refused(openai.BadRequestError, messages=[]).type == "invalid_request_error"
stranger = openai.OpenAI(base_url=sys.argv[1] + "/v1", api_key="wrong", max_retries=0)
try:
    stranger.models.list()
    raise AssertionError("a wrong key was taken")
except openai.AuthenticationError as error:
    assert error.code == "invalid_api_key"

# A client that stops reading.
with client.chat.completions.create(model=MODEL, messages=SAID, max_tokens=900, stream=True) as stream:
    next(iter(stream))
print("openai", openai.__version__, "ok")
