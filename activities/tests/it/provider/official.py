"""Talks to the fake provider with the vendors' own clients: official.py <dialect> <base URL> <key>.

Each dialect is asked for a text, a stream, a call of a tool with its round trip, an answer with a schema, and an error.
Prints the texts as one JSON object; anything unexpected is an exception.
"""

import json
import sys

SCHEMA = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}},
    "required": ["ok"],
    "additionalProperties": False,
}
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
QUESTION = "What is the weather in Paris?"


def gemini(base, key):
    from google import genai
    from google.genai import errors, types

    out = {}
    for version in ["v1", "v1beta"]:
        options = types.HttpOptions(base_url=base, api_version=version)
        client = genai.Client(api_key=key, http_options=options)
        models = client.models
        answer = models.generate_content(model="fake-large", contents="Hello?")
        assert answer.usage_metadata.total_token_count == 18, answer
        assert answer.candidates[0].finish_reason == types.FinishReason.STOP
        pieces = [piece.text or "" for piece in models.generate_content_stream(model="fake-large", contents="Hello?")]
        assert len(pieces) > 1, pieces

        tool = types.Tool(function_declarations=[
            types.FunctionDeclaration(name="get_weather", description="d", parameters_json_schema=PARAMETERS)])
        manual = types.AutomaticFunctionCallingConfig(disable=True)
        config = types.GenerateContentConfig(tools=[tool], automatic_function_calling=manual)
        first = models.generate_content(model="fake-large", contents=QUESTION, config=config)
        call = first.function_calls[0]
        assert (call.name, call.args) == ("get_weather", {"city": "Paris"}), call
        result = types.Part.from_function_response(name=call.name, response={"output": "12C"})
        history = [
            types.Content(role="user", parts=[types.Part.from_text(text=QUESTION)]),
            first.candidates[0].content,
            types.Content(role="user", parts=[result]),
        ]
        second = models.generate_content(model="fake-large", contents=history, config=config)

        shaped = types.GenerateContentConfig(response_mime_type="application/json", response_json_schema=SCHEMA)
        structured = models.generate_content(model="fake-large", contents="Hello?", config=shaped)
        try:
            models.generate_content(model="fake-large", contents="please fail")
            raise AssertionError("no error")
        except errors.ClientError as error:
            assert (error.code, error.status) == (429, "RESOURCE_EXHAUSTED"), error
        names = [model.name for model in models.list()]
        assert "models/fake-large" in names, names
        assert models.get(model="fake-small").input_token_limit == 1048576
        out[version] = [answer.text, "".join(pieces), second.text, structured.text]
    assert out["v1"] == out["v1beta"], out
    return out["v1"]


def chat_messages(first_message):
    call = first_message.tool_calls[0]
    assert json.loads(call.function.arguments) == {"city": "Paris"}, call
    return [
        {"role": "user", "content": QUESTION},
        {"role": "assistant", "content": None, "tool_calls": [{"id": call.id, "type": "function",
            "function": {"name": call.function.name, "arguments": call.function.arguments}}]},
        {"role": "tool", "tool_call_id": call.id, "content": "12C"},
    ]


HELLO = [{"role": "user", "content": "Hello?"}]
TOOLS = [{"type": "function", "function": {"name": "get_weather", "description": "d", "parameters": PARAMETERS}}]
FORMAT = {"type": "json_schema", "json_schema": {"name": "answer", "strict": True, "schema": SCHEMA}}


def openai(base, key):
    from openai import OpenAI, RateLimitError

    client = OpenAI(base_url=base, api_key=key, max_retries=0)
    create = client.chat.completions.create
    answer = create(model="fake-large", messages=HELLO)
    assert answer.usage.total_tokens == 18 and answer.choices[0].finish_reason == "stop", answer
    pieces, usage = [], None
    for chunk in create(model="fake-large", messages=HELLO, stream=True, stream_options={"include_usage": True}):
        usage = chunk.usage or usage
        pieces += [choice.delta.content or "" for choice in chunk.choices]
    assert usage.total_tokens == 18, usage
    first = create(model="fake-large", messages=[{"role": "user", "content": QUESTION}], tools=TOOLS)
    second = create(model="fake-large", messages=chat_messages(first.choices[0].message), tools=TOOLS)
    structured = create(model="fake-large", messages=HELLO, response_format=FORMAT)
    try:
        create(model="fake-large", messages=[{"role": "user", "content": "please fail"}])
        raise AssertionError("no error")
    except RateLimitError as error:
        assert error.status_code == 429, error
    assert "fake-large" in [model.id for model in client.models.list()]
    texts = [one.choices[0].message.content for one in [answer, second, structured]]
    return [texts[0], "".join(pieces), texts[1], texts[2]]


def openrouter(base, key):
    from openrouter import OpenRouter, errors

    with OpenRouter(api_key=key, server_url=base, retry_config=None) as client:
        send = client.chat.send
        answer = send(model="fake-large", messages=HELLO)
        assert answer.usage.total_tokens == 18 and answer.choices[0].finish_reason == "stop", answer
        pieces, usage = [], None
        for chunk in send(model="fake-large", messages=HELLO, stream=True):
            usage = chunk.usage or usage
            pieces += [choice.delta.content or "" for choice in chunk.choices]
        assert usage.total_tokens == 18, usage
        first = send(model="fake-large", messages=[{"role": "user", "content": QUESTION}], tools=TOOLS)
        second = send(model="fake-large", messages=chat_messages(first.choices[0].message), tools=TOOLS)
        structured = send(model="fake-large", messages=HELLO, response_format=FORMAT)
        try:
            send(model="fake-large", messages=[{"role": "user", "content": "please fail"}])
            raise AssertionError("no error")
        except errors.OpenRouterError as error:
            assert error.status_code == 429, error
        assert client.credits.get_credits().data.total_credits == 100.0
    texts = [one.choices[0].message.content for one in [answer, second, structured]]
    return [texts[0], "".join(pieces), texts[1], texts[2]]


if __name__ == "__main__":
    dialect, base_url, api_key = sys.argv[1:]
    print(json.dumps({"gemini": gemini, "openai": openai, "openrouter": openrouter}[dialect](base_url, api_key)))
