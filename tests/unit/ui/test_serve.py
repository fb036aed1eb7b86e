"""The process: tokens, hosts and ports that cannot be used are one line; the command listens, answers and ends."""

import os
import re
import signal
import socket
import subprocess
import sys
import urllib.request

import pytest

from selftrans.cli.main import main
from selftrans.ui.guard import Guard
from selftrans.ui.serve import chosen_token, listening, shown_host
from tests.support.processes import LONGEST
from tests.support.ui_runs import begun
from tests.unit.cli.lines import one_line


def test_tokens():
    assert chosen_token("127.0.0.1", None) is None and chosen_token("0.0.0.0", "x" * 12) == "x" * 12
    made = {chosen_token("localhost", "auto") for _ in range(3)}
    assert len(made) == 3 and all(len(token) >= 32 for token in made)
    for wrong in ("short", "with a space in it", "ä" * 20):
        with pytest.raises(ValueError, match="--token needs 12 characters at least"):
            chosen_token("localhost", wrong)


def test_the_printed_host_can_be_opened():
    assert shown_host("::1") == "[::1]" and shown_host("192.168.0.7") == "192.168.0.7"
    assert shown_host("0.0.0.0") == shown_host("::") == socket.gethostname()
    assert Guard(None, host="0.0.0.0", token="x")._is_own_host(f"{socket.gethostname()}:8377")


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.0.7", "example.org"])
def test_another_host_needs_a_token(host, capsys):
    assert main(["ui", f"--host={host}"]) == 1
    assert "is reached from other machines; give --token too (auto makes one)" in one_line(capsys)


def test_folders_and_ports_that_cannot_be_used(tmp_path, capsys):
    assert main(["ui", str(tmp_path / "nowhere")]) == 1
    assert "nowhere is not a folder; give a run, or a folder with runs in it" in one_line(capsys)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert main(["ui", str(tmp_path), f"--port={port}"]) == 1
    assert f"127.0.0.1:{port} cannot be used (Address already in use); give another --port" in one_line(capsys)
    with pytest.raises(ValueError, match="--port 70000 is no port"):
        listening("127.0.0.1", 70_000)


def test_without_its_library_the_command_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.delitem(sys.modules, "selftrans.ui.serve", raising=False)
    assert main(["ui"]) == 1
    assert "the page needs uvicorn; install it: pip install 'selftrans[ui]'" in one_line(capsys)


def test_the_command_listens_answers_and_ends(tmp_path):
    begun(tmp_path / "one")
    token = "a+token&of#tests"
    command = [sys.executable, "-m", "selftrans", "ui", str(tmp_path), "--port=0", f"--token={token}"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=dict(os.environ)
    ) as process:
        try:
            assert process.stdout.readline() == f"1 run in {tmp_path}\n"
            address = re.search(r"http://\S+", process.stdout.readline())[0]
            url, _, query = address.partition("?")
            assert query == "token=a%2Btoken%26of%23tests"
            # the token of the address is compared first; a wrong one is refused whatever the headers say
            asked = urllib.request.Request(f"{url}api/runs?{query}", headers={"Authorization": f"Bearer {token}"})
            with urllib.request.urlopen(asked, timeout=LONGEST) as answer:
                assert b'"name":"one"' in answer.read()
            process.send_signal(signal.SIGINT)
            assert process.wait(LONGEST) == 0
        finally:
            process.kill()
        assert process.stdout.read() == "ended\n" and process.stderr.read() == ""
