"""Servers of object storage on the loopback: moto for S3, gcp-storage-emulator for GCS, and a proxy that misbehaves."""

import contextlib
import http.client
import http.server
import json
import random
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request

BUCKET = "bucket"


class Server:
  """A server in a process of its own, behind a proxy.

  Attributes:
    scheme: "s3" or "gs".
    direct: its address.
    proxy: a `Proxy` in front of it.
    environment: environment variables that lead through the proxy.
  """

  def __init__(self, scheme: str, log: str):
    port = _free_port()
    self.scheme, self.direct, self._log = scheme, f"http://127.0.0.1:{port}", open(log, "wb")
    if scheme == "s3":
      command = ["-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    else:
      command = ["-m", "gcp_storage_emulator", "start", "--host=127.0.0.1", f"--port={port}", "--in-memory"]
      command.append(f"--default-bucket={BUCKET}")
    self._process = subprocess.Popen([sys.executable, *command], stdout=self._log, stderr=subprocess.STDOUT)
    _wait_for(port, self._process)
    if scheme == "s3":
      urllib.request.urlopen(urllib.request.Request(f"{self.direct}/{BUCKET}", method="PUT"), timeout=30).close()
    self.proxy = Proxy(port)
    self.environment = variables(scheme, self.proxy.address)

  def close(self) -> None:
    self.proxy.close()
    self._process.kill()
    self._process.wait()
    self._log.close()


def variables(scheme: str, address: str) -> dict[str, str]:
  """The standard variables for a server at an address."""
  if scheme == "s3":
    keys = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"}
    return keys | {"AWS_ENDPOINT_URL": address, "AWS_EC2_METADATA_DISABLED": "true"}
  return {"STORAGE_EMULATOR_HOST": address}


class Proxy:
  """Passes requests on to a port of the loopback. It can refuse, stall, or be away.

  Attributes:
    refuse: share of the requests that are answered with 503.
    stall: share of the requests that are not answered for `stall_seconds`, and then cut.
    away: closes every connection without an answer.
    requests: lines such as "GET /bucket/name", in order; with the name from the body, where that has it.
  """

  def __init__(self, port: int, seed: int = 0):
    self.refuse, self.stall, self.stall_seconds, self.away, self.delay = 0.0, 0.0, 3.0, False, 0.0
    self.requests: list[str] = []
    self.generations = Generations(port)
    self.draw = random.Random(seed).random
    handler = type("Handler", (_Handler,), {"proxy": self, "port": port})
    self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    self._server.daemon_threads = True
    self.address = f"http://127.0.0.1:{self._server.server_port}"
    threading.Thread(target=self._server.serve_forever, daemon=True).start()

  @contextlib.contextmanager
  def misbehaving(self, **settings: float):
    """A context with other values of the attributes."""
    before = {name: getattr(self, name) for name in settings}
    self.__dict__.update(settings)
    try:
      yield
    finally:
      self.__dict__.update(before)

  def close(self) -> None:
    self._server.shutdown()
    self._server.server_close()


class Generations:
  """What GCS has and its emulator lacks: conditions on an object's generation, and the header that says which it is.

  TensorStore makes use of both where several processes write one checkpoint.
  """

  _OBJECT = re.compile(r"(?:/download|/upload)?/storage/v1/b/([^/?]+)/o(?:/([^?]+))?(?:\?(.*))?")

  def __init__(self, port: int):
    self._port, self._lock = port, threading.Lock()

  @contextlib.contextmanager
  def checked(self, command: str, path: str):
    """A context for passing a request on: (the status that it gets instead or None, headers for its answer)."""
    match = self._OBJECT.fullmatch(path)
    options = dict(urllib.parse.parse_qsl(match[3] or "")) if match else {}
    name = match and (match[2] or urllib.parse.quote(options.get("name", ""), safe=""))
    wanted, seen = options.get("ifGenerationMatch"), options.get("ifGenerationNotMatch")
    read = command == "GET" and options.get("alt") == "media"
    if not name or not (read or wanted or seen):
      yield None, []
      return
    with self._lock:  # nobody writes between the condition and what depends on it
      now = self._generation(match[1], name)
      status = 412 if wanted not in (None, now) else 304 if seen not in (None, "0") and seen == now else None
      yield status, [("x-goog-generation", now)] if read and now != "0" else []

  def _generation(self, bucket, name):
    """An object's generation; "0" if there is none."""
    try:
      with urllib.request.urlopen(f"http://127.0.0.1:{self._port}/storage/v1/b/{bucket}/o/{name}", timeout=60) as found:
        return str(json.load(found)["generation"])
    except urllib.error.HTTPError:
      return "0"


def as_media_upload(path: str, headers: dict[str, str], body: bytes) -> tuple[str, dict[str, str], bytes]:
  """A multipart upload as an upload of the content alone: the emulator reads parts as text and may drop a last newline.

  Args:
    path: of the request, with "uploadType=multipart".
    headers: with the boundary in Content-Type.
    body: the object's description in JSON, and its content.

  Returns:
    (path, headers, body). An empty object stays as it is: the emulator takes it in a part only. Others lose their
    Content-Type: the emulator would parse JSON.
  """
  boundary = re.search(r'boundary="?([^";]+)', headers["Content-Type"])[1].encode()
  line = b"\r\n" if body.split(boundary, 1)[1].startswith(b"\r\n") else b"\n"
  _, description, content = body.split(b"--" + boundary, 2)
  content = content[: content.rindex(line + b"--" + boundary)].split(2 * line, 1)[1]
  if not content:
    return path, headers, body
  name = urllib.parse.quote(json.loads(description.split(2 * line, 1)[1])["name"], safe="")
  headers = {key: value for key, value in headers.items() if key != "Content-Type"}
  return path.replace("uploadType=multipart", f"uploadType=media&name={name}"), headers, content


class _Handler(http.server.BaseHTTPRequestHandler):
  protocol_version = "HTTP/1.1"
  proxy: Proxy
  port: int

  def _pass_on(self):
    body = self._body()
    proxy = self.proxy
    name = re.search(rb'"name": *"([^"]+)"', body[:999]) if "uploadType=multipart" in self.path else None
    proxy.requests.append(f"{self.command} {self.path} {name[1].decode() if name else ''}".strip())
    time.sleep(proxy.delay)
    fate = proxy.draw()
    if proxy.away or fate < proxy.stall:
      time.sleep(0 if proxy.away else proxy.stall_seconds)
      self.close_connection = True
      return
    if fate < proxy.stall + proxy.refuse:
      self._answer(503, [], b"<Error><Code>SlowDown</Code></Error>")
      return
    with proxy.generations.checked(self.command, self.path) as (status, more):
      if status:
        self._answer(status, [], b"")
      else:
        self._forward(body, more)

  def _forward(self, body, more):
    path, headers = self.path, {name: value for name, value in self.headers.items() if name.lower() not in _HOP}
    if "uploadType=multipart" in path:
      path, headers, body = as_media_upload(path, headers, body)
    upstream = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
    upstream.request(self.command, path, body or None, headers | {"Content-Length": str(len(body))})
    answer = upstream.getresponse()
    content = answer.read()
    kept = [(name, value) for name, value in answer.getheaders() if name.lower() not in _HOP] + more
    if self.command == "HEAD":
      kept.append(("Content-Length", answer.getheader("Content-Length", "0")))
    upstream.close()
    self._answer(answer.status, kept, content)

  def _answer(self, status, headers, content):
    self.send_response_only(status)
    for name, value in headers:
      self.send_header(name, value)
    if self.command != "HEAD":
      self.send_header("Content-Length", str(len(content)))
    self.end_headers()
    self.wfile.write(content)

  def _body(self):
    if self.headers.get("Expect", "").lower() == "100-continue":
      pass  # `handle_expect_100` has answered
    if "chunked" not in self.headers.get("Transfer-Encoding", ""):
      return self.rfile.read(int(self.headers.get("Content-Length") or 0))
    parts = []
    while count := int(self.rfile.readline().split(b";")[0], 16):
      parts.append(self.rfile.read(count))
      self.rfile.readline()
    self.rfile.readline()
    return b"".join(parts)

  def log_message(self, format, *args):
    pass

  def handle(self):
    with contextlib.suppress(OSError):  # the client was killed
      super().handle()

  do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = do_PATCH = _pass_on


_HOP = ("connection", "content-length", "transfer-encoding", "keep-alive", "expect")


def _free_port():
  with socket.socket() as found:
    found.bind(("127.0.0.1", 0))
    return found.getsockname()[1]


def _wait_for(port, process):
  for _ in range(600):
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
      return
    if process.poll() is not None:
      raise RuntimeError("the server ended")
    time.sleep(0.1)
  raise RuntimeError("the server does not answer")
