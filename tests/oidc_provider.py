"""An OpenID provider with a device flow for tests: Authlib's authorization server (RFC 8628 and OpenID Connect Core) on a real port."""

import threading
import time
from typing import Any, ClassVar

import httpx
from authlib.integrations.flask_oauth2 import AuthorizationServer
from authlib.oauth2.rfc6749 import ClientMixin
from authlib.oauth2.rfc8628 import DeviceAuthorizationEndpoint, DeviceCodeGrant, DeviceCredentialDict
from authlib.oidc.core import UserInfo
from authlib.oidc.core.grants.code import OpenIDToken
from flask import Flask, jsonify
from joserfc.jwk import RSAKey
from werkzeug.serving import make_server

CLIENT = "qipan"
GRANT = "urn:ietf:params:oauth:grant-type:device_code"


class Client(ClientMixin):
    """Public: it has no secret."""

    def get_client_id(self) -> str:
        return CLIENT

    def get_allowed_scope(self, scope: str) -> str:
        return scope

    def check_client_secret(self, client_secret: str) -> bool:
        return False

    def check_endpoint_auth_method(self, method: str, endpoint: str) -> bool:
        return method == "none"

    def check_grant_type(self, grant_type: str) -> bool:
        return grant_type == GRANT

    def check_response_type(self, response_type: str) -> bool:
        return False


class Provider:
    """`people`: name -> claims.  A person approves a code by `approve`, or refuses it."""

    def __init__(self) -> None:
        self.people: dict[str, dict[str, Any]] = {}
        self.key = RSAKey.generate_key(2048, {"kid": "k1", "use": "sig", "alg": "RS256"})
        self.answers: dict[str, tuple[str, bool]] = {}
        app = Flask("provider")
        self._server = make_server("127.0.0.1", 0, app, threaded=True)
        self.issuer = f"http://127.0.0.1:{self._server.server_port}"
        self._routes(app)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def approve(self, user_code: str, person: str, *, yes: bool = True) -> None:
        self.answers[user_code] = (person, yes)

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def id_token_of(self, person: str) -> str:
        """By the whole flow."""
        begun = httpx.post(
            f"{self.issuer}/device", data={"client_id": CLIENT, "scope": "openid profile"}
        ).json()
        self.approve(begun["user_code"], person)
        asked = {"grant_type": GRANT, "device_code": begun["device_code"], "client_id": CLIENT}
        return str(httpx.post(f"{self.issuer}/token", data=asked).json()["id_token"])

    def _routes(self, app: Flask) -> None:
        provider, credentials = self, {}

        class Endpoint(DeviceAuthorizationEndpoint):
            CLIENT_AUTH_METHODS: ClassVar = ["none"]
            INTERVAL = 1

            def get_verification_uri(self) -> str:
                return f"{provider.issuer}/activate"

            def save_device_credential(self, client_id: str, scope: str, data: dict[str, Any]) -> None:
                more = {
                    "client_id": client_id,
                    "scope": scope,
                    "expires_at": time.time() + data["expires_in"],
                }
                credentials[data["device_code"]] = DeviceCredentialDict({**data, **more})

        class Grant(DeviceCodeGrant):
            TOKEN_ENDPOINT_AUTH_METHODS: ClassVar = ["none"]

            def query_device_credential(self, device_code: str) -> Any:
                return credentials.get(device_code)

            def query_user_grant(self, user_code: str) -> Any:
                return provider.answers.get(user_code)

            def should_slow_down(self, credential: Any) -> bool:
                return False

        class Identity(OpenIDToken):
            def get_client_algorithm(self, client: Client) -> str:
                return "RS256"

            def get_encode_header(self, client: Client) -> dict[str, str]:
                return {"alg": "RS256", "kid": "k1"}

            def resolve_client_private_key(self, client: Client) -> RSAKey:
                return provider.key

            def get_compatible_claims(self, request: Any) -> dict[str, Any]:
                now_s = int(time.time())
                return {"iss": provider.issuer, "aud": [CLIENT], "iat": now_s, "exp": now_s + 600}

            def generate_user_info(self, user: str, scope: str) -> UserInfo:
                return UserInfo(sub=user, **provider.people[user])

        server = AuthorizationServer(app, query_client=lambda name: Client() if name == CLIENT else None, save_token=lambda token, request: None)  # fmt: skip
        server.register_endpoint(Endpoint)
        server.register_grant(Grant, [Identity()])

        @app.get("/.well-known/openid-configuration")
        def about() -> Any:
            at = provider.issuer
            return jsonify(issuer=at, jwks_uri=f"{at}/keys", token_endpoint=f"{at}/token", device_authorization_endpoint=f"{at}/device")  # fmt: skip

        @app.get("/keys")
        def keys() -> Any:
            return jsonify(keys=[provider.key.as_dict(private=False)])

        @app.post("/device")
        def device() -> Any:
            return server.create_endpoint_response("device_authorization")

        @app.post("/token")
        def token() -> Any:
            return server.create_token_response()
