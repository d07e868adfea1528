"""The web server of the lab, a process of its own: http://mirror.lab (Debian) and http://pypi.lab/simple/ (Python)."""

import hashlib
import html
import http.server
import json
import pathlib
import re
import socket
import sys
import threading
import urllib.parse


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves files of the mirrors, or a simple index (PEP 503) made from the folders of Python packages."""

    protocol_version = "HTTP/1.1"
    mirrors = indexes = ()

    def translate_path(self, path):
        """Return the file for ``path``: the first folder that has it."""
        path = urllib.parse.unquote(urllib.parse.urlsplit(path).path).lstrip("/")
        if ".." in path.split("/"):
            return "/nonexistent"
        folders = self.mirrors
        if self.is_index():
            path, folders = path.removeprefix("files/"), self.indexes
        return next((str(f / path) for f in folders if (f / path).exists()), "/nonexistent")

    def is_index(self):
        return self.headers.get("Host", "").startswith("pypi.")

    def do_GET(self):
        parts = urllib.parse.urlsplit(self.path).path.strip("/").split("/")
        if not self.is_index() or parts[0] != "simple":
            super().do_GET()
            return
        links = index(self.indexes)
        if len(parts) == 1:
            body = "".join(f'<a href="/simple/{name}/">{name}</a><br>\n' for name in sorted(links))
        elif parts[1] in links:
            body = "".join(links[parts[1]])
        else:
            self.send_error(404)
            return
        body = f"<!DOCTYPE html><html><body>\n{body}</body></html>\n".encode()
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format, *args):
        """Keep a log: what a host asked for is often the answer."""
        print(self.headers.get("Host"), format % args, file=sys.stderr, flush=True)


def index(folders, known={}):  # noqa: B006 (the files do not change while the server lives)
    """Return the links of every project in ``folders``: ``{normalised name: [link]}``."""
    if not known:
        for file in sorted(path for folder in folders for path in folder.iterdir()):
            name = file.name.split("-")[0] if file.suffix == ".whl" else file.name.rsplit("-", 1)[0]
            name = re.sub(r"[-_.]+", "-", name).lower()
            digest = hashlib.sha256(file.read_bytes()).hexdigest()
            link = f'<a href="/files/{html.escape(file.name)}#sha256={digest}">{html.escape(file.name)}</a><br>\n'
            if link not in known.setdefault(name, []):
                known[name].append(link)
    return known


class Server(http.server.ThreadingHTTPServer):
    """One listening address."""

    request_queue_size = 64

    def __init__(self, address):
        self.address_family = socket.AF_INET6 if ":" in address else socket.AF_INET
        super().__init__((address, 80), Handler)


def main(settings):
    """Serve until killed; say so on stdout when all addresses listen."""
    Handler.mirrors = [pathlib.Path(path) for path in settings["mirrors"]]
    Handler.indexes = [pathlib.Path(path) for path in settings["indexes"]]
    index(Handler.indexes)
    servers = [Server(address) for address in settings["addresses"]]
    print("ready", flush=True)
    for server in servers[1:]:
        threading.Thread(target=server.serve_forever, daemon=True).start()
    servers[0].serve_forever()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
