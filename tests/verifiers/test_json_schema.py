"""`json_schema`: where the document stands, what is JSON, and that a schema can't reach outside or break the verifier."""

import json

import pytest

from verifiers import PlainTask, VerifierLookupError, prepare, resolve

SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer", "minimum": 0}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
GOOD = '{"name": "Ada", "age": 36}'


def audit_of(verifier, task):
    found = prepare(verifier, task)
    assert found is not None
    return found


@pytest.mark.parametrize("schema", [SCHEMA, json.dumps(SCHEMA)])
@pytest.mark.parametrize(
    "completion",
    [
        GOOD,
        f" \n{GOOD}\n",
        f"<think>{{}} no</think>{GOOD}",
        f"<think>a</think>\n<answer>{GOOD}</answer>",
        f"Here it is:\n```json\n{GOOD}\n```\nDone.",
        f"<answer>```\n{GOOD}\n```</answer>".replace("<answer>", "<answer>\n"),
        f"```json\n{{}}\n```\nNo, rather:\n```json\n{GOOD}\n```",
    ],
)
def test_the_document_is_found_and_fits(completion, schema):
    verdict = resolve("json_schema")(completion, PlainTask(schema))
    assert (verdict.score, verdict.status, json.loads(verdict.extracted)) == (1.0, "correct", json.loads(GOOD))


@pytest.mark.parametrize(
    ("completion", "status", "reason"),
    [
        ('{"name": "Ada"}', "wrong", "at $: 'age' is a required property"),
        ('{"name": "Ada", "age": -1}', "wrong", "at $.age: -1 is less than the minimum of 0"),
        ('{"name": "Ada", "age": 1, "x": 1}', "wrong", "Additional properties are not allowed"),
        (f"The answer is {GOOD}", "unparsable", "not JSON"),
        (f"{GOOD} {GOOD}", "unparsable", "Extra data"),
        ('{"name": "Ada", "age": 1, "age": 2}', "unparsable", "the same key twice"),
        ('{"name": "Ada", "age": NaN}', "unparsable", "NaN is no JSON value"),
        ("{'name': 'Ada', 'age': 1}", "unparsable", "not JSON"),
        ('{"age": ' + "9" * 5000 + "}", "unparsable", "not JSON"),
        ("[" * 100_000 + "]" * 100_000, "unparsable", "nested more than 100 deep"),
        ("[" * 102 + "]" * 102, "unparsable", "nested more than 100 deep"),
        ("[" + "1," * 100_000 + "1]", "unparsable", "200003 characters are more than 200000"),
        ("", "unparsable", "the answer is empty"),
        ("<answer></answer>", "unparsable", "the answer is empty"),
    ],
)
def test_what_does_not_fit_and_what_is_no_json(completion, status, reason):
    verdict = resolve("json_schema", {"schema": SCHEMA})(completion, PlainTask(None))
    assert (verdict.score, verdict.status) == (0.0, status)
    assert reason in verdict.reason


@pytest.mark.parametrize(
    ("gold", "status", "reason"),
    [
        (None, "missing", "it is a NoneType, not an object"),
        ("{", "unparsable", "it is not JSON"),
        ({"type": "strng"}, "unparsable", "at $.type"),
        ([1], "unparsable", "it is a list, not an object"),
        ({"a": {1}}, "unparsable", "it is not JSON"),
    ],
)
def test_unusable_schemas_are_errors_and_found_by_the_audit(gold, status, reason):
    verifier = resolve("json_schema")
    verdict = verifier(GOOD, PlainTask(gold))
    assert (verdict.status, "the schema is unusable" in verdict.reason) == ("error", True)
    audit = audit_of(verifier, PlainTask(gold))
    assert (audit.status, reason in audit.reason) == (status, True)


def test_references_stay_inside_the_schema(monkeypatch):
    import urllib.request

    monkeypatch.setattr(urllib.request, "urlopen", lambda *_, **__: pytest.fail("it went to the network"))
    outside = resolve("json_schema")("1", PlainTask({"$ref": "http://example.com/schema.json"}))
    assert (outside.status, "which is not in it" in outside.reason) == ("error", True)
    inside = {"$ref": "#/$defs/n", "$defs": {"n": {"type": "integer"}}}
    assert [resolve("json_schema")(t, PlainTask(inside)).status for t in ("1", '"1"')] == ["correct", "wrong"]
    assert resolve("json_schema")("1", PlainTask({"$ref": "#"})).reason == "the schema recurses without end"


def test_options():
    formats = {"type": "string", "format": "ipv4"}
    loose, strict = (resolve("json_schema", {"schema": formats, "check_formats": each}) for each in (False, True))
    assert [each('"x"', PlainTask(None)).status for each in (loose, strict)] == ["correct", "wrong"]
    assert audit_of(strict, PlainTask(None)).status == "ok"
    with pytest.raises(VerifierLookupError, match="the option schema is unusable: at"):
        resolve("json_schema", {"schema": {"type": "strng"}})
