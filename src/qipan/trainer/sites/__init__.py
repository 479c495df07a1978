"""One model at several sites: outer steps over a slow link.

`outer` (a site's side of a round), `flat` (whole-model coordinates), `codec` (what goes over the wire), `mailbox`
(sockets between twins), `desk` (facts to the coordinator, views back).
"""
