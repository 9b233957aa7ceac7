"""A stand-in for the Hugging Face Hub on the loopback: the few HTTP endpoints that pushing and downloading use."""

import base64
import contextlib
import hashlib
import http.server
import json
import re
import threading
import urllib.parse


class LocalHub:
  """A server with repositories in memory.

  Attributes:
    address: for HF_ENDPOINT.
    files: {repository: {path: content}}.
    objects: {SHA-256: content} of Git LFS.
    private: {repository: whether it was made private}.
    requests: (method, path) of everything that was asked.
    refusal: if not "", what every commit is refused with.
  """

  def __init__(self):
    self.files, self.objects, self.private, self.requests, self.refusal = {}, {}, {}, [], ""
    hub = self

    class Handler(http.server.BaseHTTPRequestHandler):
      protocol_version = "HTTP/1.1"

      def log_message(self, *args):
        pass

      def do_GET(self):
        hub.answer(self)

      do_POST = do_PUT = do_HEAD = do_GET

    self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    self.address = f"http://127.0.0.1:{self._server.server_address[1]}"

  @contextlib.contextmanager
  def running(self):
    thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
      yield self
    finally:
      self._server.shutdown()
      self._server.server_close()
      thread.join()

  def sha(self, repository):
    digest = hashlib.sha1()
    for name, content in sorted(self.files[repository].items()):
      digest.update(name.encode() + content)
    return digest.hexdigest()

  def answer(self, request):
    path = urllib.parse.unquote(urllib.parse.urlsplit(request.path).path)
    self.requests.append((request.command, path))
    body = request.rfile.read(int(request.headers.get("Content-Length") or 0))
    status, content, headers = self._answer(request.command, path, body, request.headers)
    if not isinstance(content, bytes):
      content, headers = json.dumps(content).encode(), {"Content-Type": "application/json", **headers}
    request.send_response(status)
    for name, value in {**headers, "Content-Length": str(len(content))}.items():
      request.send_header(name, value)
    request.end_headers()
    if request.command != "HEAD":
      request.wfile.write(content)

  def _answer(self, method, path, body, headers):
    if method == "PUT" and path.startswith("/lfs/"):
      return self._put(path.removeprefix("/lfs/"), body)
    if method == "POST" and headers.get("Authorization") != "Bearer hf_local":
      return 401, {"error": "Invalid credentials"}, {}
    if path == "/api/repos/create":
      asked = json.loads(body)
      name = f"{asked['organization']}/{asked['name']}"
      self.files.setdefault(name, {})
      self.private[name] = asked.get("visibility") == "private"
      return 200, {"url": f"{self.address}/{name}", "name": name}, {}
    if path == "/api/validate-yaml":
      return 200, {"errors": [], "warnings": []}, {}
    if re.fullmatch(r"/[^/]+/[^/]+\.git/info/lfs/objects/batch", path):
      return self._batch(body)
    if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/main", path):
      return 200, {"files": [self._mode(entry) for entry in json.loads(body)["files"]]}, {}
    if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/main", path):
      if self.refusal:
        return 403, {"error": self.refusal}, {"X-Error-Message": self.refusal}
      self._commit(match[1], body)
      oid = self.sha(match[1])
      url = f"{self.address}/{match[1]}/commit/{oid}"
      return 200, {"success": True, "commitOid": oid, "commitUrl": url, "hookOutput": ""}, {}
    if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/[^/]+)?", path):
      return self._info(match[1])
    if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/[^/]+/?", path):
      return self._tree(match[1])
    if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path):
      return self._file(match[1], match[2])
    return 404, {"error": f"not here: {method} {path}"}, {}

  def _mode(self, entry):
    """The Hub stores weights and images as Git LFS objects, whatever their size."""
    large = entry["path"].endswith((".safetensors", ".png"))
    mode = "lfs" if large else "regular"
    return {"path": entry["path"], "uploadMode": mode, "shouldIgnore": False, "oid": None}

  def _batch(self, body):
    """Where each object that is not here is to be put: Git LFS's batch interface, transfer "basic"."""
    objects = []
    for wanted in json.loads(body)["objects"]:
      oid = wanted["oid"]
      actions = {} if oid in self.objects else {"actions": {"upload": {"href": f"{self.address}/lfs/{oid}"}}}
      objects.append({"oid": oid, "size": wanted["size"], **actions})
    return 200, {"transfer": "basic", "objects": objects}, {"Content-Type": "application/vnd.git-lfs+json"}

  def _put(self, oid, body):
    assert hashlib.sha256(body).hexdigest() == oid
    self.objects[oid] = body
    return 200, {}, {}

  def _commit(self, repository, body):
    for line in body.decode().splitlines():
      entry = json.loads(line)
      if entry["key"] == "file":
        assert entry["value"]["encoding"] == "base64"
        self.files[repository][entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
      elif entry["key"] == "lfsFile":
        assert entry["value"]["algo"] == "sha256"
        self.files[repository][entry["value"]["path"]] = self.objects[entry["value"]["oid"]]

  def _missing(self):
    return 404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"}

  def _info(self, repository):
    if repository not in self.files:
      return self._missing()
    siblings = [{"rfilename": name} for name in sorted(self.files[repository])]
    return 200, {"id": repository, "sha": self.sha(repository), "siblings": siblings, "tags": []}, {}

  def _tree(self, repository):
    if repository not in self.files:
      return self._missing()
    entry = lambda name, content: {
      "type": "file",
      "path": name,
      "size": len(content),
      "oid": hashlib.sha1(content).hexdigest(),
    }
    return 200, [entry(*item) for item in sorted(self.files[repository].items())], {}

  def _file(self, repository, name):
    content = self.files.get(repository, {}).get(name)
    if content is None:
      return 404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"}
    return 200, content, {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": self.sha(repository)}
