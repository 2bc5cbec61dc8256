"""`rediss://` against a real server behind TLS: who is verified, and what is said when that fails."""

import contextlib
import datetime
import ipaddress
import select
import socket
import ssl
import threading

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from redis.exceptions import RedisError

from webhook_app import doctor, queues, settings
from webhook_app.queues import DELIVER, Bell

LOOPBACK = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))


def certificate(directory, name):
    """A certificate that signs itself, as Heroku's does; the files of certificate and both with its key."""
    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.datetime.now(datetime.UTC)
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "redis of the tests")])
    made = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=2))
        .not_valid_after(now + datetime.timedelta(days=2))
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName([name]), critical=False)
        .sign(key, hashes.SHA256())
    )
    public, both = directory / "ca.pem", directory / "both.pem"
    public.write_bytes(made.public_bytes(serialization.Encoding.PEM))
    secret = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    both.write_bytes(secret + public.read_bytes())
    return public, both


class Terminator:
    """A port that speaks TLS and hands on to the Redis of the tests."""

    def __init__(self, redis_path, chain):
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.load_cert_chain(chain)
        self.redis_path = redis_path
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=self._serve, args=(self.listener.accept()[0],), daemon=True).start()

    def _serve(self, raw):
        with (
            contextlib.suppress(OSError),
            raw,
            self.context.wrap_socket(raw, server_side=True) as client,
            socket.socket(socket.AF_UNIX) as server,
        ):
            server.connect(self.redis_path)
            while True:
                ready = [client] if client.pending() else select.select([client, server], [], [])[0]
                for source, target in ((client, server), (server, client)):
                    if source in ready:
                        data = source.recv(65536)
                        if not data:
                            return
                        target.sendall(data)

    def close(self):
        self.listener.close()


@pytest.fixture
def behind_tls(redis_client, redis_url, tmp_path):
    """`behind_tls(name)`: URL of Redis behind a certificate for that name, and the file that it is in."""
    with contextlib.ExitStack() as stack:

        def start(name=LOOPBACK):
            public, both = certificate(tmp_path, name)
            server = Terminator(redis_url.removeprefix("unix://"), both)
            stack.callback(server.close)
            return f"rediss://127.0.0.1:{server.port}", public

        yield start


def client(url, **environ):
    return queues.connect(settings.load({"REDIS_URL": url, **environ}).redis_url, 20.0)


def test_a_certificate_that_nobody_vouches_for_is_refused_with_the_way_out(behind_tls, caplog):
    url, _ = behind_tls()
    with client(url) as redis, pytest.raises(RedisError) as refused:
        redis.ping()
    assert queues.is_untrusted(refused.value)
    with client(url) as redis:
        assert Bell(redis).ring(DELIVER) is False
    assert "its certificate is refused" in caplog.text
    assert "REDIS_TLS_VERIFY=false" in caplog.text
    found = list(doctor._redis(settings.load({"REDIS_URL": url})))
    assert [(one.level, one.what) for one in found] == [("fail", "the certificate of Redis is refused")]
    assert "REDIS_TLS_VERIFY=false" in found[0].mend


def test_it_is_taken_where_it_is_named_or_need_not_be_verified(behind_tls, monkeypatch):
    url, public = behind_tls()
    for more, environ in (
        (f"?ssl_ca_certs={public}", {}),
        ("", {"REDIS_TLS_VERIFY": "false"}),
        ("", {"DYNO": "web.1"}),
    ):
        with client(url + more, **environ) as redis:
            assert redis.ping()
            assert Bell(redis).ring(DELIVER)
    monkeypatch.setenv("SSL_CERT_FILE", str(public))
    with client(url) as redis:
        assert redis.ping(), "the store of the system"


def test_a_certificate_for_another_name_is_refused(behind_tls):
    url, public = behind_tls(x509.DNSName("other.example"))
    with client(f"{url}?ssl_ca_certs={public}") as redis, pytest.raises(RedisError) as refused:
        redis.ping()
    assert queues.is_untrusted(refused.value)


def test_another_error_is_told_as_it_is():
    assert queues.reason(RedisError("Connection refused")) == "Connection refused"
