"""Which text of a completion is the program: fences, tags, several of them, none, and what comes after the thinking."""

import pytest

from verifiers.code.extract_program import MAX_PROGRAM_CHARS, extract_program


@pytest.mark.parametrize(
    ("completion", "source", "language"),
    [
        ("```python\nx = 1\n```", "x = 1\n", "python"),
        ("Here:\n```py\nx = 1\n```\nDone.", "x = 1\n", "python"),
        ("```\nx = 1\n```", "x = 1\n", None),
        ("~~~cpp\nint x;\n~~~", "int x;\n", "cpp"),
        ("```C++\nint x;\n```", "int x;\n", "cpp"),
        ('```{.python title="a"}\nx\n```', "x\n", "python"),
        ("x = 1\nprint(x)", "x = 1\nprint(x)", None),
        ("<think>```python\nbad\n```</think>```python\ngood\n```", "good\n", "python"),
        ("<think>a</think>\nprint(1)", "\nprint(1)", None),
        ("```python\nfirst\n```\n```python\nsecond\n```", "second\n", "python"),
        ("```python\nx\n```\nOutput:\n```\n3\n```", "x\n", "python"),
        ("```python\nx\n```\n```text\n3\n```", "x\n", "python"),
        ("````python\na = '''\n```\n'''\n````", "a = '''\n```\n'''\n", "python"),
        ("```python\ncut = 1\nprint(", "cut = 1\nprint(", "python"),
        ("```python\r\nx = 1\r\n```", "x = 1\n", "python"),
        ("1. So:\n\n    ```python\n    if x:\n        y\n    ```\n", "if x:\n    y\n", "python"),
        ("```python\nx\n```\nRun it:\n```bash\npython solution.py\n```", "x\n", "python"),
        ("```bash\nread n\n```", "read n\n", "bash"),
        ("\ufeff```python\n\ufeffx = 1\n```", "x = 1\n", "python"),
        (
            'def f():\n    """\n    ```\n    f()\n    ```\n    """\n',
            'def f():\n    """\n    ```\n    f()\n    ```\n    """\n',
            None,
        ),
    ],
)
def test_the_program_of_a_completion(completion, source, language):
    program = extract_program(completion)
    assert program is not None
    assert (program.source, program.language) == (source, language)


@pytest.mark.parametrize(
    "completion", ["", "  \n", "<think>x</think>", "```json\n{}\n```", "x" * (MAX_PROGRAM_CHARS + 1)]
)
def test_no_program(completion):
    assert extract_program(completion) is None


def source_of(text, *args, **options):
    program = extract_program(text, *args, **options)
    assert program is not None
    return program.source


def test_the_last_fence_that_defines_the_function_wins():
    text = "```python\ndef f(x): return 1\n```\nand to try it:\n```python\nprint(f(3))\n```"
    assert source_of(text, ["f"]) == "def f(x): return 1\n"
    assert source_of(text, ["g"]) == "print(f(3))\n"


def test_the_language_asked_for_comes_first():
    text = "```cpp\nint x;\n```\nor\n```python\nx = 1\n```"
    assert source_of(text, language="cpp") == "int x;\n"
    assert source_of(text, language="rust") == "x = 1\n"
    assert source_of("```\nint x;\n```\n```sh\nmake\n```", language="cpp") == "int x;\n"


def test_several_fences_by_option():
    text = "```python\na\n```\n```python\nb\n```\n```js\nc\n```"
    assert source_of(text, several="first") == "a\n"
    assert source_of(text.replace("js", "python"), several="join") == "a\n\nb\n\nc\n"
