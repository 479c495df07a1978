"""The boards' own sentences in 中文.  A sentence that is not known is shown as it came."""

import re
from functools import lru_cache

NUMBER = r"([\d.]+)"
#: (what a board says, whole or a part between "; ", how it is said in 中文)
SAYINGS = tuple(
    (re.compile(pattern), chinese)
    for pattern, chinese in (
        (rf"(\S+) at (\S+): (\d+) devices?, {NUMBER} s of work left at that point", r"\1，点位 \2：\3 个设备，在此还需 \4 秒"),
        (rf"(\S+) at (\S+): (\d+) devices?, {NUMBER} s of work left at that point, placed anew from {NUMBER} s of saved work", r"\1，点位 \2：\3 个设备，在此还需 \4 秒，从已存档的 \5 秒工作接着做"),
        (rf"placed anew from {NUMBER} s of saved work", r"从已存档的 \1 秒工作接着做"),
        (r"from (\S+) \((\d+) devices?\) to (\S+) \((\d+)\)", r"从 \1（\2 个设备）到 \3（\4 个）"),
        (rf"{NUMBER} s left before, {NUMBER} s after, the change costs {NUMBER} s", r"原来还需 \1 秒，之后还需 \2 秒，变动花 \3 秒"),
        (rf"{NUMBER} s left before, {NUMBER} s after, the change costs {NUMBER} s in place", r"原来还需 \1 秒，之后还需 \2 秒，不重启，变动花 \3 秒"),
        (rf"{NUMBER} s left before, {NUMBER} s after", r"原来还需 \1 秒，之后还需 \2 秒"),
        (r"attempt (\d+) was lost \((.*)\)", r"第 \1 次中断（\2）"),
        (rf"{NUMBER} s of work since the last checkpoint is done again.*", r"上次存档之后的 \1 秒工作要重做"),
        (rf"{NUMBER} s (?:of work )?is kept", r"保留 \1 秒工作"),
        (r"a worker was killed \(SIGKILL\)", r"一个进程被杀（SIGKILL）"),
        (r"killed by signal (\d+)", r"被信号 \1 杀死"),
        (r"the task failed", r"任务失败"),
        (r"exit code (\d+)", r"退出码 \1"),
        (r"cancelled by the user", r"由用户取消"),
        (r"cancelled by (.+)", r"由 \1 取消"),
        (r"parked by (.+)", r"由 \1 封盘"),
        (r"continues when the board is taken up again", r"重新开盘时继续"),
        (r"parked with its checkpoint before its budget is overrun: (.*)", r"预算将尽，存档后封盘：\1"),
        (r"parked with its checkpoint: (.*)", r"存档后封盘：\1"),
        (r"(\S+) raised its budget to (.+)", r"\1 把预算提高到 \2"),
        (r"(\S+) does not answer(?:: (.*))?", r"\1 没有应答"),
        (r"(\S+) gave it back: (.*)", r"\1 退回：\2"),
        (r"(\S+) refused lately", r"\1 刚刚拒绝过"),
        (r"(\S+) refused: (.*)", r"\1 拒绝：\2"),
        (r"(\S+) no longer holds it", r"\1 不再持有它"),
        (r"(\S+) had finished it before it fell silent", r"\1 失联之前已经做完"),
        (r"(.*); this board did not know it", r"\1；本棋盘此前不知道它"),
        (r"(\S+) has (\d+) devices? of (\S+) to give at once, it needs (\d+)", r"\1 现在能一次给出 \2 个 \3，需要 \4 个"),
        (r"(\S+) has no (\d+) devices? of (\S+) to give now", r"\1 现在给不出 \2 个 \3"),
        (rf"(\S+) asks {NUMBER} CNY/h for (\d+) devices? of (\S+), (\S+) is worth {NUMBER}", r"\1 为 \3 个 \4 要价每小时 \2 元，点位 \5 只值 \6 元"),
        (r"limits.vendors keeps it off (\S+)", r"limits.vendors 不许用 \1"),
        (r"limits.regions keeps it out of (\S+)", r"limits.regions 不许在 \1"),
        (r"and so at (\d+) more places", r"另有 \1 处也一样"),
        (r"(\S+): starts when (.+) is done", r"\1：待 \2 完成后开始"),
        (r"starts when (.+) is done", r"待 \1 完成后开始"),
        (r"(.+) done: it may start", r"\1 已完成：可以开始"),
        (r"(\S+), which feeds it, failed", r"供样阶段 \1 失败"),
        (r"(\S+), which it feeds, is (\S+)", r"它供样的 \1 已结束"),
        (r"it starts together with (.+)", r"与 \1 一同开始"),
        (r"own script", r"自有脚本"),
        (r"dearer by (\S+) CNY, ends (\S+) later", r"贵 \1 CNY，晚 \2"),
        (r"dearer by (\S+) CNY, ends (\S+) sooner", r"贵 \1 CNY，早 \2"),
        (r"cheaper by (\S+) CNY, ends (\S+) later", r"便宜 \1 CNY，晚 \2"),
        (r"cheaper by (\S+) CNY, ends (\S+) sooner", r"便宜 \1 CNY，早 \2"),
        (r"dearer by (\S+) CNY, ends at the same time", r"贵 \1 CNY，同时结束"),
        (r"cheaper by (\S+) CNY, ends at the same time", r"便宜 \1 CNY，同时结束"),
        (r"chosen", r"选中"),
        (r"wrong user or password", r"用户名或密码不对"),
        (rf"too many tries to log in; wait {NUMBER} s", r"尝试登录太多次，请等 \1 秒"),
        (r"(\d+) logins with the provider began within a minute; wait one, or log in with a password", r"一分钟内已开始 \1 次统一身份登录；请等一分钟，或用密码登录"),
        (r"no login with the provider is under way; begin again", r"没有进行中的统一身份登录；请重新开始"),
        (r"the code is over; log in again", r"验证码已过期；请重新登录"),
        (r"your session at this console is over; log in again", r"您在此控制台的会话已结束；请重新登录"),
        (r"the OpenID provider (\S+) does not answer: (.*)", r"统一身份提供方 \1 没有应答：\2"),
        (r"(\S+) refuses: (.*)", r"\1 拒绝：\2"),
        (r"no server answers for the store (.+) \((.*)\); start one with (.+)", r"存储 \1 没有服务应答（\2）；请启动：\3"),
        (r"no task '(.*)'; the latest are: (.+)", r"没有任务 \1；最近的有：\2"),
    )
)  # fmt: skip


@lru_cache(4096)
def say(text: str, language: str) -> str:
    if language != "zh" or not text:
        return text
    whole = _one(text)
    if whole is not None:
        return whole
    return "；".join(_one(part) or part for part in text.split("; "))


def _one(text: str) -> str | None:
    for pattern, chinese in SAYINGS:
        found = pattern.fullmatch(text)
        if found is not None:
            return _filled(chinese, [_one(group) or group if group else "" for group in found.groups()])
    return None


def _filled(chinese: str, groups: list[str]) -> str:
    return re.sub(r"\\(\d)", lambda number: groups[int(number[1]) - 1], chinese)
