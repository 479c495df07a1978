// The live part of a page, the draft of a task, and the door.  No network but this console.
"use strict";

const byId = (id) => document.getElementById(id);

/** Bring `old` to what `fresh` is.  Children with the same id are kept, so that only what changed moves. */
function morph(old, fresh) {
  if (old.nodeType !== fresh.nodeType || old.nodeName !== fresh.nodeName || (old.id || "") !== (fresh.id || "")) {
    old.replaceWith(fresh);
    return;
  }
  if (old.nodeType !== Node.ELEMENT_NODE) {
    if (old.nodeValue !== fresh.nodeValue) old.nodeValue = fresh.nodeValue;
    return;
  }
  for (const { name } of [...old.attributes]) if (!fresh.hasAttribute(name) && name !== "open") old.removeAttribute(name);
  const from = old.dataset?.x && [old.dataset.x, old.dataset.y];
  for (const { name, value } of fresh.attributes) if (old.getAttribute(name) !== value) old.setAttribute(name, value);
  if (from && (from[0] !== old.dataset.x || from[1] !== old.dataset.y)) slide(old, from);
  const known = new Map([...old.children].filter((child) => child.id).map((child) => [child.id, child]));
  let place = old.firstChild;
  for (const child of [...fresh.childNodes]) {
    const same = child.id ? known.get(child.id) : place && !place.id ? place : null;
    if (same && same.parentNode === old) {
      if (same !== place) old.insertBefore(same, place);
      const next = same.nextSibling;
      morph(same, child);
      place = next;
    } else {
      old.insertBefore(child, place);
    }
  }
  while (place) {
    const next = place.nextSibling;
    leave(place);
    place = next;
  }
}

const still = () => matchMedia("(prefers-reduced-motion: reduce)").matches;

/** A task that went elsewhere on the map moves there. */
function slide(stone, from) {
  if (still()) return;
  const at = (x, y) => ({ transform: `translate(${x}px, ${y}px)` });
  stone.animate([at(...from), at(stone.dataset.x, stone.dataset.y)], { duration: 1200, easing: "ease-in-out" });
}

/** A stone that is taken off the board is seen to go. */
function leave(node) {
  const stone = node.classList?.contains("stone") && !still();
  if (!stone || !node.parentNode.isConnected) {
    node.remove();
    return;
  }
  const ghost = node.cloneNode(true);
  ghost.removeAttribute("id");
  ghost.classList.add("taken");
  node.replaceWith(ghost);
  setTimeout(() => ghost.remove(), 500);
}

function parsed(html) {
  return new DOMParser().parseFromString(html, "text/html").body;
}

/** Show what the server sends about a page.  A hidden tab listens to nothing: browsers allow six streams a host. */
function follow(live, pulse) {
  let source = null;
  const tell = (kind) => {
    pulse.className = `pulse ${kind}`;
    if (pulse.textContent !== pulse.dataset[kind]) pulse.textContent = pulse.dataset[kind];
  };
  const show = (html) => {
    const holder = live.cloneNode(false);
    holder.append(...parsed(html).childNodes);
    const log = live.querySelector(".log");
    const atEnd = log && log.scrollTop + log.clientHeight >= log.scrollHeight - 8;
    morph(live, holder);
    if (atEnd) log.scrollTop = log.scrollHeight;
  };
  const listen = () => {
    source?.close();
    source = null;
    if (document.hidden) return;
    source = new EventSource(live.dataset.source);
    source.addEventListener("live", (event) => { show(JSON.parse(event.data)); tell("live"); });
    source.addEventListener("offline", () => tell("offline"));
    source.addEventListener("error", () => tell("offline"));
  };
  document.addEventListener("visibilitychange", listen);
  listen();
}

function draft(form) {
  const text = byId("text");
  let waiting = 0, asked = 0;
  async function send(changed) {
    const number = ++asked;
    const body = new URLSearchParams({ text: text.value });
    if (changed) {
      body.set("changed", changed.dataset.path);
      body.set("value", changed.value);
    }
    const answer = await fetch("/draft", { method: "POST", body });
    if (!answer.ok || number !== asked) return;
    const value = await answer.json();
    if (changed) text.value = value.text;
    if (value.fields) {
      for (const field of form.querySelectorAll("[data-path]")) {
        if (field !== document.activeElement) field.value = value.fields[field.dataset.path];
      }
    }
    byId("plan").replaceChildren(...parsed(value.plan).childNodes);
  }
  const soon = (changed) => {
    clearTimeout(waiting);
    waiting = setTimeout(() => send(changed), 250);
  };
  text.addEventListener("input", () => soon(null));
  for (const field of form.querySelectorAll("[data-path]")) {
    field.addEventListener("change", () => { clearTimeout(waiting); send(field); });
  }
  send(null);
}

const live = byId("live");
if (live) follow(live, byId("pulse"));
if (byId("draft")) draft(byId("draft"));
if (byId("door") && location.hash.length > 1) {
  byId("key").value = location.hash.slice(1);
  history.replaceState(null, "", location.pathname);
  byId("door").submit();
}
