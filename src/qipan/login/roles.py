"""What a role may do: one decision, and whatever is not named is refused.

viewer    reads, and asks for plans; of one tenant, or of all where it has none
user      also submits, stops and pays, for its own tenant alone
operator  everything, of every tenant
"""

ROLES = ("viewer", "user", "operator")
READS = ("GET", "HEAD")
#: what changes nothing although it is a POST, and what everybody may do to their own account
FOR_ALL = ("/v1/plan", "/v1/users/me/password")
FOR_OPERATORS = ("/v1/users", "/v1/whatif")


def allows(role: str, method: str, path: str) -> bool:
    """`path` without query.  What is whose is decided by the route."""
    if role == "operator" or path in FOR_ALL:
        return role in ROLES
    if any(path == one or path.startswith(f"{one}/") for one in FOR_OPERATORS):
        return False
    if method in READS:
        return role in ROLES
    return role == "user"
