"""Programs in other languages, compiled once in the sandbox, where the tools are; a clear error where they are not."""

import pytest

from tests.verifiers.code.support import PlainTask, need_namespaces
from verifiers.code import languages
from verifiers.code_verifier import CodeVerifier

SUM = {"mode": "stdin", "tests": [{"input": "3 4\n", "output": "7\n"}, {"input": "30 4\n", "output": "34\n"}]}
PROGRAMS = {
    "cpp": "#include <iostream>\nint main() { int a, b; std::cin >> a >> b; std::cout << a + b << std::endl; }",
    "c": '#include <stdio.h>\nint main() { int a, b; scanf("%d %d", &a, &b); printf("%d\\n", a + b); return 0; }',
    "javascript": "const [a, b] = require('fs').readFileSync('/dev/stdin', 'utf8').split(' ').map(Number); console.log(a + b)",
    "java": "import java.util.*;\npublic class Sum { public static void main(String[] x) { Scanner s = new Scanner(System.in);"
    " System.out.println(s.nextInt() + s.nextInt()); } }",
    "rust": "use std::io::*;\nfn main() { let mut s = String::new(); stdin().read_to_string(&mut s).unwrap();"
    ' println!("{}", s.split_whitespace().map(|x| x.parse::<i32>().unwrap()).sum::<i32>()); }',
    "go": 'package main\nimport "fmt"\nfunc main() { var a, b int; fmt.Scan(&a, &b); fmt.Println(a + b) }',
    "bash": "read a b; echo $((a + b))",
}  # fmt: skip


@pytest.mark.parametrize("language", sorted(PROGRAMS))
def test_a_right_and_a_wrong_program(language):
    need_namespaces()
    if not languages.is_available(language):
        pytest.skip(f"the tools for {language} are not on this machine")
    verifier = CodeVerifier(timeout_s=20.0, total_timeout_s=60.0)
    right = verifier(f"```{language}\n{PROGRAMS[language]}\n```", PlainTask(SUM))
    assert right.status == "correct", right.reason
    wrong_source = (
        PROGRAMS[language].replace("a + b", "a - b").replace("+ s.nextInt", "- s.nextInt").replace("sum::", "product::")
    )
    assert verifier(f"```{language}\n{wrong_source}\n```", PlainTask(SUM)).status == "wrong"


@pytest.mark.parametrize(
    ("language", "source", "reason"),
    [
        ("c", "int main( { }", "does not compile"),
        ("c", '#include "/etc/passwd"\nint main() { return 0; }', "does not compile"),
        ("c", "#include <stdlib.h>\nint main() { abort(); }", "killed by signal 6"),
        ("c", "int main() { char *p = 0; *p = 1; return 0; }", "killed by signal 11"),
        ("bash", "exit 3", "exit status 3"),
        ("bash", "echo 7; rm -rf / 2>/dev/null; kill -9 -1", "test 1 of 2"),
    ],
)
def test_why_other_programs_fail(language, source, reason):
    need_namespaces()
    if not languages.is_available(language):
        pytest.skip(f"the tools for {language} are not on this machine")
    verdict = CodeVerifier(timeout_s=10.0)(f"```{language}\n{source}\n```", PlainTask(SUM))
    assert (verdict.status, reason in verdict.reason) == ("wrong", True), verdict.reason


def test_a_missing_compiler_is_an_error_that_names_it(monkeypatch):
    languages._tool.cache_clear()
    monkeypatch.setattr(languages.shutil, "which", lambda *args, **kwargs: None)
    verdict = CodeVerifier()("```go\npackage main\n```", PlainTask(SUM))
    languages._tool.cache_clear()
    assert (verdict.status, verdict.reason) == ("error", "Go programs can't be run here: go is not installed")


def test_java_class_names():
    assert (
        languages._java("class A { }\npublic class B { public static void main(String[] a) {} }").source_name
        == "B.java"
    )
    assert (
        languages._java("class A { int x; }\nclass C { public static void main(String[] a) {} }").source_name
        == "C.java"
    )
    assert languages._java("nothing").source_name == "Main.java"
