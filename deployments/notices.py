"""Tells somebody of runs that failed or crashed, and of runs that wait for approval: by a webhook, or by one of
Prefect's notification blocks (mail, Slack, Teams, ...), which the user has made in Prefect's page.

The webhook's address is a secret. Prefect keeps it encrypted in a block; nothing else holds it.
"""

from __future__ import annotations

from prefect.blocks.webhook import Webhook
from prefect.client.orchestration import SyncPrefectClient
from prefect.events.actions import CallWebhook, SendNotification
from prefect.events.schemas.automations import Automation, AutomationCore, EventTrigger, Posture
from prefect.events.schemas.events import ResourceSpecification
from prefect.exceptions import ObjectNotFound
from prefect.types import SecretDict
from pydantic import SecretStr

from radlads.tasks.contracts.errors import UserError
from radlads.tasks.contracts.settings import Notices

WEBHOOK = "radlads-webhook-notice"
"""The automation that calls the webhook, and the block with its address."""
MESSAGE = "radlads-message-notice"
"""The automation that sends by a notification block."""
_EVENTS = ("Failed", "Crashed", "TimedOut", "Paused", "Suspended")
_FLOWS = "radlads*"
_SUBJECT = "radlads: {{ flow_run.name }} is {{ flow_run.state.name }}"
_BODY = "{{ flow_run.state.message }}\n{{ (flow_run|ui_url) or '' }}"
_PAYLOAD = (
    '{"text": {{ ("radlads: " ~ flow_run.name ~ " is " ~ flow_run.state.name ~ ": " ~ (flow_run.state.message or "") ~ '
    '" " ~ ((flow_run|ui_url) or "")) | tojson }}}'
)
"""JSON with one text, as Slack, Mattermost and most others take it."""


def make_notices(client: SyncPrefectClient, notices: Notices) -> list[str]:
    """Create or correct the automations that are asked for; returns what was changed. What is not asked for any more
    stays, to be deleted in Prefect's page. Raises UserError if there is no such block."""
    made: list[str] = []
    if notices.url is not None:
        changed = _keep_address(notices.url)
        block = client.read_block_document_by_name(WEBHOOK, "webhook", include_secrets=False)
        action = CallWebhook(block_document_id=block.id, payload=_PAYLOAD)
        made += _keep_automation(client, WEBHOOK, action) or ([f"address of {WEBHOOK}"] if changed else [])
    if notices.block is not None:
        kind, name = notices.block
        try:
            block = client.read_block_document_by_name(name, kind, include_secrets=False)
        except ObjectNotFound:
            raise UserError(
                f"RADLADS_NOTIFY_BLOCK: Prefect has no block {kind}/{name}; make it in its page, under Blocks"
            ) from None
        made += _keep_automation(
            client, MESSAGE, SendNotification(block_document_id=block.id, subject=_SUBJECT, body=_BODY)
        )
    return made


def _keep_address(url: str) -> bool:
    """Put the address into the block; returns whether it was another one."""
    wanted = Webhook(url=SecretStr(url), headers=SecretDict({"Content-Type": "application/json"}))
    try:
        known = Webhook.load(WEBHOOK)
    except ValueError:
        known = None
    if isinstance(known, Webhook) and known.url == wanted.url and known.headers == wanted.headers:
        return False
    wanted.save(WEBHOOK, overwrite=True)
    return True


def _keep_automation(client: SyncPrefectClient, name: str, action: CallWebhook | SendNotification) -> list[str]:
    asked = AutomationCore(
        name=name,
        description="Tells of runs of radlads that failed, crashed, or wait for approval.",
        trigger=EventTrigger(
            expect={f"prefect.flow-run.{name}" for name in _EVENTS},
            match=ResourceSpecification.model_validate({"prefect.resource.id": "prefect.flow-run.*"}),
            match_related=ResourceSpecification.model_validate(
                {"prefect.resource.role": "flow", "prefect.resource.name": _FLOWS}
            ),
            for_each={"prefect.resource.id"},
            posture=Posture.Reactive,
            threshold=1,
        ),
        actions=[action],
    )
    known: list[Automation] = client.read_automations_by_name(name)
    if not known:
        client.create_automation(asked)
        return [f"automation {name}"]
    if known[0].actions == asked.actions:
        return []
    client.update_automation(known[0].id, asked.model_copy(update={"enabled": known[0].enabled}))
    return [f"receiver of {name}"]
