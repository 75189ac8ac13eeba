"""A small Hugging Face Hub on the loopback interface, for the real client to talk to.

Repositories with branches, pull requests and commits, the LFS protocol (single and
multipart), downloads with ranges, tokens, and failures at will. It checks what the Hub
checks: tokens and their roles, that a commit's large files have been uploaded, and that
their content has the digest that was promised.
"""

import asyncio
import base64
import hashlib
import json
import re
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote

import yaml
from aiohttp import web

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

CUT = "cut"
"""As a failure's status: the connection ends in the middle of the file."""

LOST = "lost"
"""As a failure's status: what is asked is done, and a gateway's 504 is the answer."""

ENDLESS = "endless"
"""As a failure's status: the file does not end, and its size is not told."""

PART_SIZE = 20_000
MULTIPART_ABOVE = 50_000
"""Bytes. The Hub's are in megabytes."""

WRITE_TOKEN = "hf_write"
READ_TOKEN = "hf_read"


@dataclass(frozen=True)
class Blob:
    """Attributes: content; is_lfs, whether it is a large file."""

    content: bytes
    is_lfs: bool

    @property
    def oid(self) -> str:
        if self.is_lfs:
            return hashlib.sha256(self.content).hexdigest()
        header = f"blob {len(self.content)}\0".encode()
        return hashlib.sha1(header + self.content).hexdigest()


@dataclass
class Repository:
    """
    Attributes:
        private: Whether only tokens of its owner see it.
        commits: Files by path, of every commit.
        refs: The commit of every branch and pull request.
        titles: Summaries of the commits, oldest first.
    """

    private: bool
    commits: dict[str, dict[str, Blob]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    titles: list[str] = field(default_factory=list)

    def commit(self, ref: str, title: str, files: dict[str, Blob]) -> str:
        oid = hashlib.sha1(f"{title}{len(self.commits)}".encode()).hexdigest()
        self.commits[oid] = files
        self.refs[ref] = oid
        self.titles.append(title)
        return oid

    def resolve(self, revision: str) -> str | None:
        return self.refs.get(revision, revision if revision in self.commits else None)

    def files(self, revision: str = "main") -> dict[str, Blob]:
        return self.commits[self.refs[revision]]


@dataclass
class Failure:
    """
    Attributes:
        pattern: Regular expression for "METHOD /path" of the requests that fail.
        status: Of the answer, or CUT, LOST or ENDLESS.
        times: How many requests are still to fail.
        headers: Of the answer.
    """

    pattern: str
    status: int | str
    times: int
    headers: dict[str, str]


class _Refused(Exception):
    """An answer that ends the handling of a request."""

    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.response = _error(status, message, code)


class HubServer:
    """
    The server, which runs in a thread of its own from `running` on.

    Attributes:
        url: Where it listens.
        repositories: By "owner/name".
        requests: "METHOD /path" of all requests, oldest first.
        uploaded_bytes: Of large files.
        endless_bytes: Sent of files that do not end.
    """

    def __init__(self) -> None:
        self.url = ""
        self.repositories: dict[str, Repository] = {}
        self.requests: list[str] = []
        self.uploaded_bytes = 0
        self.endless_bytes = 0
        self.tokens: dict[str, dict[str, Any]] = {
            WRITE_TOKEN: {"role": "write"},
            READ_TOKEN: {"role": "read"},
        }
        self._lfs: dict[str, bytes] = {}
        self._parts: dict[str, dict[int, bytes]] = {}
        self._failures: list[Failure] = []

    def fail(
        self, pattern: str, status: int | str, times: int = 1, **headers: str
    ) -> None:
        """Let the next requests that match fail."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        self._failures.append(Failure(pattern, status, times, named))

    def store(self, blob: Blob) -> None:
        """A large file, as if it had been uploaded."""
        self._lfs[blob.oid] = blob.content

    def heal(self) -> None:
        """No more failures."""
        self._failures.clear()

    @contextmanager
    def running(self) -> Iterator["HubServer"]:
        """Serve on a free port of the loopback interface."""
        loop = asyncio.new_event_loop()
        runner = web.AppRunner(self._application(), access_log=None, shutdown_timeout=1)

        async def start() -> None:
            await runner.setup()
            site = web.TCPSite(runner, "127.0.0.1", 0)
            await site.start()
            port = runner.addresses[0][1]
            self.url = f"http://127.0.0.1:{port}"

        loop.run_until_complete(start())
        thread = threading.Thread(target=loop.run_forever, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result(10)
            loop.call_soon_threadsafe(loop.stop)
            thread.join(10)
            loop.close()

    def _application(self) -> web.Application:
        app = web.Application(client_max_size=2**30, middlewares=[self._middleware])
        repo = "{owner:[^/]+}/{name:[^/]+}"
        app.add_routes(
            [
                web.get("/api/whoami-v2", self._whoami),
                web.post("/api/validate-yaml", self._validate_yaml),
                web.post("/api/repos/create", self._create),
                web.get(f"/api/models/{repo}", self._info),
                web.get(f"/api/models/{repo}/revision/{{revision}}", self._info),
                web.get(f"/api/models/{repo}/tree/{{revision}}", self._tree),
                web.post(f"/api/models/{repo}/branch/{{revision}}", self._branch),
                web.post(f"/api/models/{repo}/preupload/{{revision}}", self._preupload),
                web.post(f"/api/models/{repo}/commit/{{revision}}", self._commit),
                web.post(
                    "/{owner}/{name:[^/]+?}.git/info/lfs/objects/batch", self._lfs_batch
                ),
                web.put("/lfs/{oid}", self._lfs_put),
                web.put("/lfs/{oid}/{part}", self._lfs_put),
                web.post("/lfs/{oid}/complete", self._lfs_complete),
                web.post("/lfs/{oid}/verify", self._lfs_verify),
                web.get(f"/{repo}/resolve/{{revision}}/{{path:.+}}", self._resolve),
                web.get("/cdn/{oid}", self._cdn),
            ]
        )
        return app

    # What every request meets

    @web.middleware
    async def _middleware(
        self, request: web.Request, handler: Handler
    ) -> web.StreamResponse:
        line = f"{request.method} {request.path}"
        self.requests.append(line)
        for failure in self._failures:
            if failure.times > 0 and re.search(failure.pattern, line):
                failure.times -= 1
                if failure.status == LOST:
                    await handler(request)
                    return _error(504, "injected", **failure.headers)
                if failure.status == ENDLESS:
                    return await self._endless(request, handler)
                if failure.status != CUT:
                    return _error(int(failure.status), "injected", **failure.headers)
                if request.method in ("GET", "HEAD"):
                    return await self._half(request, handler)
                size = request.content_length or 0
                await request.content.read(max(size // 2, 1))
                assert request.transport is not None
                request.transport.abort()
                return web.Response()
        try:
            return await handler(request)
        except _Refused as refused:
            return refused.response

    async def _half(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        whole = await handler(request)
        assert isinstance(whole, web.Response) and isinstance(whole.body, bytes)
        half = web.StreamResponse(status=whole.status, headers=whole.headers)
        half.content_length = len(whole.body)
        await half.prepare(request)
        await half.write(whole.body[: len(whole.body) // 2])
        assert request.transport is not None
        request.transport.abort()
        return half

    async def _endless(
        self, request: web.Request, handler: Handler
    ) -> web.StreamResponse:
        whole = await handler(request)
        whole.headers.popall("X-Linked-Size", None)
        if whole.status != 200:  # the redirection to a large file
            return whole
        endless = web.StreamResponse(headers=whole.headers)
        endless.headers.popall("Content-Length", None)
        endless.enable_chunked_encoding()
        await endless.prepare(request)
        if request.method == "GET":
            for _ in range(200):  # megabytes, which is enough to see
                await endless.write(bytes(2**20))
                self.endless_bytes += 2**20
        return endless

    def _user(self, request: web.Request) -> dict[str, Any] | None:
        token = request.headers.get("Authorization", "").removeprefix("Bearer ")
        return self.tokens.get(token)

    def _repository(self, request: web.Request, write: bool = False) -> Repository:
        repo_id = f"{request.match_info['owner']}/{request.match_info['name']}"
        repository, user = self.repositories.get(repo_id), self._user(request)
        if repository is None or (repository.private and user is None):
            raise _Refused(404 if user else 401, "Repository not found", "RepoNotFound")
        if write and user is None:
            raise _Refused(401, "Invalid username or password.")
        if write and user is not None and user["role"] != "write":
            raise _Refused(403, "You don't have the required permissions")
        return repository

    def _files(self, request: web.Request) -> tuple[str, dict[str, Blob]]:
        repository = self._repository(request)
        oid = repository.resolve(unquote(request.match_info.get("revision", "main")))
        if oid is None:
            raise _Refused(404, "Invalid rev id", "RevisionNotFound")
        return oid, repository.commits[oid]

    # Accounts and repositories

    async def _whoami(self, request: web.Request) -> web.Response:
        user = self._user(request)
        if user is None:
            return _error(401, "Invalid credentials in Authorization header")
        token = {"displayName": "test", **user}
        return web.json_response(
            {
                "type": "user",
                "name": "user",
                "orgs": [{"name": "lab", "roleInOrg": "write"}],
                "auth": {"type": "access_token", "accessToken": token},
            }
        )

    async def _validate_yaml(self, request: web.Request) -> web.Response:
        content = (await request.json())["content"]
        found = re.match(r"---\n(.*?)\n---\n", content, flags=re.DOTALL)
        data = yaml.safe_load(found[1]) if found else {}
        if data.get("license") == "no-such-licence":
            error = {"message": '"license" must be one of [mit, apache-2.0, ...]'}
            return web.json_response({"errors": [error], "warnings": []}, status=400)
        return web.json_response({"errors": [], "warnings": []})

    async def _create(self, request: web.Request) -> web.Response:
        body = await request.json()
        user = self._user(request)
        if user is None:
            return _error(401, "Invalid username or password.")
        if user["role"] != "write":
            return _error(403, "You don't have the rights to create a model")
        repo_id = f"{body.get('organization') or 'user'}/{body['name']}"
        if repo_id in self.repositories:
            message = "You already created this model repo"
            answer = {"error": message, "url": f"{self.url}/{repo_id}"}
            return web.json_response(answer, status=409)
        self.add_repository(
            repo_id,
            private=body.get("visibility") == "private" or bool(body.get("private")),
        )
        return web.json_response({"url": f"{self.url}/{repo_id}"})

    def add_repository(self, repo_id: str, private: bool = False) -> Repository:
        """A new repository, with the one file that the Hub starts with."""
        repository = self.repositories[repo_id] = Repository(private)
        attributes = Blob(b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n", False)
        repository.commit("main", "initial commit", {".gitattributes": attributes})
        return repository

    async def _info(self, request: web.Request) -> web.Response:
        oid, files = self._files(request)
        return web.json_response(
            {
                "id": f"{request.match_info['owner']}/{request.match_info['name']}",
                "sha": oid,
                "private": self._repository(request).private,
                "tags": [],
                "siblings": [{"rfilename": path} for path in files],
            }
        )

    async def _tree(self, request: web.Request) -> web.Response:
        _, files = self._files(request)
        entries = [
            {
                "type": "file",
                "path": path,
                "oid": blob.oid,
                "size": len(blob.content),
            }
            for path, blob in files.items()
        ]
        return web.json_response(entries)

    async def _branch(self, request: web.Request) -> web.Response:
        repository = self._repository(request, write=True)
        branch = unquote(request.match_info["revision"])
        if branch in repository.refs:
            return _error(409, "Branch already exists")
        repository.refs[branch] = repository.refs["main"]
        return web.json_response({})

    # Commits

    async def _preupload(self, request: web.Request) -> web.Response:
        self._repository(request, write="create_pr" not in request.query)
        _, files = self._files(request)
        asked = (await request.json())["files"]
        answer = [
            {
                "path": path,
                "uploadMode": "lfs" if path.endswith(".safetensors") else "regular",
                "shouldIgnore": False,
                "oid": files[path].oid if path in files else None,
            }
            for path in (file["path"] for file in asked)
        ]
        return web.json_response({"files": answer})

    async def _commit(self, request: web.Request) -> web.Response:
        repository = self._repository(request, write="create_pr" not in request.query)
        _, files = self._files(request)
        files, title = dict(files), ""
        for line in (await request.text()).splitlines():
            item = json.loads(line)
            key, value = item["key"], item["value"]
            if key == "header":
                title = value["summary"]
            elif key == "file":
                files[value["path"]] = Blob(base64.b64decode(value["content"]), False)
            elif key == "lfsFile":
                if value["oid"] not in self._lfs:
                    return _error(422, f"LFS object of {value['path']} does not exist")
                files[value["path"]] = Blob(self._lfs[value["oid"]], True)
            elif key == "deletedFile":
                if files.pop(value["path"], None) is None:
                    message = "A file with this name doesn't exist"
                    return _error(404, message, "EntryNotFound")
            else:
                return _error(400, f"unknown operation {key}")
        revision = unquote(request.match_info["revision"])
        number = 1 + sum(ref.startswith("refs/pr/") for ref in repository.refs)
        pull_request = "create_pr" in request.query
        ref = f"refs/pr/{number}" if pull_request else revision
        oid = repository.commit(ref, title, files)
        repo_url = (
            f"{self.url}/{request.match_info['owner']}/{request.match_info['name']}"
        )
        return web.json_response(
            {
                "success": True,
                "commitOid": oid,
                "commitUrl": f"{repo_url}/commit/{oid}",
                "pullRequestUrl": f"{repo_url}/discussions/{number}"
                if pull_request
                else None,
            }
        )

    # Large files

    async def _lfs_batch(self, request: web.Request) -> web.Response:
        objects = []
        for item in (await request.json())["objects"]:
            oid, size = item["oid"], item["size"]
            answer: dict[str, Any] = {"oid": oid, "size": size}
            if oid not in self._lfs:
                href, header = f"{self.url}/lfs/{oid}", {}
                if size > MULTIPART_ABOVE:
                    parts = range(1, -(-size // PART_SIZE) + 1)
                    header = {str(part): f"{href}/{part}" for part in parts}
                    header["chunk_size"] = str(PART_SIZE)
                answer["actions"] = {
                    "upload": {
                        "href": f"{href}/complete" if header else href,
                        "header": header,
                    },
                    "verify": {"href": f"{href}/verify"},
                }
            objects.append(answer)
        return web.json_response({"transfer": "basic", "objects": objects})

    async def _lfs_put(self, request: web.Request) -> web.Response:
        oid, content = request.match_info["oid"], await request.read()
        self.uploaded_bytes += len(content)
        part = request.match_info.get("part")
        if part is None:
            return self._store(oid, content)
        self._parts.setdefault(oid, {})[int(part)] = content
        return web.Response(headers={"ETag": hashlib.md5(content).hexdigest()})

    async def _lfs_complete(self, request: web.Request) -> web.Response:
        oid = request.match_info["oid"]
        numbers = [part["partNumber"] for part in (await request.json())["parts"]]
        parts = self._parts.pop(oid)
        return self._store(oid, b"".join(parts[number] for number in numbers))

    def _store(self, oid: str, content: bytes) -> web.Response:
        if hashlib.sha256(content).hexdigest() != oid:
            return _error(400, "content does not match its digest")
        self._lfs[oid] = content
        return web.Response()

    async def _lfs_verify(self, request: web.Request) -> web.Response:
        stored = self._lfs.get(request.match_info["oid"])
        if stored is None or len(stored) != (await request.json())["size"]:
            return _error(404, "no such object")
        return web.Response()

    # Downloads

    async def _resolve(self, request: web.Request) -> web.Response:
        oid, files = self._files(request)
        headers = {"X-Repo-Commit": oid}
        blob = files.get(request.match_info["path"])
        if blob is None:
            return _error(404, "Entry not found", "EntryNotFound", **headers)
        headers |= {
            "X-Linked-Size": str(len(blob.content)),
            "X-Linked-ETag": f'"{blob.oid}"',
            "ETag": f'"{blob.oid}"',
        }
        if not blob.is_lfs:
            return _content(request, blob.content, headers)
        # another host than ours to the client, as the Hub's storage is
        location = self.url.replace("127.0.0.1", "localhost") + f"/cdn/{blob.oid}"
        return web.Response(status=302, headers={**headers, "Location": location})

    async def _cdn(self, request: web.Request) -> web.Response:
        return _content(request, self._lfs[request.match_info["oid"]], {})


def _content(
    request: web.Request, content: bytes, headers: dict[str, str]
) -> web.Response:
    found = re.fullmatch(r"bytes=(\d+)-", request.headers.get("Range", ""))
    if not found:
        return web.Response(body=content, headers=headers)
    start = int(found[1])
    headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
    return web.Response(status=206, body=content[start:], headers=headers)


def _error(
    status: int, message: str, code: str | None = None, **headers: str
) -> web.Response:
    all_headers = {"X-Error-Message": message, **headers}
    if code is not None:
        all_headers["X-Error-Code"] = code
    return web.json_response({"error": message}, status=status, headers=all_headers)
