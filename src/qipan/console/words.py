"""The console's words, 中文 first.  Words for one thing are those of docs/words.md."""

LANGUAGES = ("zh", "en")
#: key -> (中文, English)
WORDS: dict[str, tuple[str, str]] = {
    "title": ("棋盘", "Qipan"),
    "motto": ("算力供给一盘棋", "one board for all compute"),
    "skip": ("跳到内容", "skip to content"),
    "other": ("English", "中文"),
    "board": ("棋盘", "Board"), "submit": ("提交", "Submit"), "tasks": ("任务", "Tasks"), "task": ("任务", "Task"),
    "supply": ("供给", "Supply"), "prices": ("价格", "Prices"), "money": ("账务", "Money"), "decisions": ("决策", "Decisions"),
    "live": ("实时", "live"), "offline": ("连接中断，正在重连", "connection lost, trying again"), "lost": ("失去", "lost"),
    "free": ("空闲", "free"), "leased": ("已租", "leased"), "devices": ("设备", "devices"), "of": ("共", "of"),
    "tariff": ("资费", "tariff"), "ask": ("要价", "ask"), "per_hour": ("每设备时", "per device-hour"),
    "place": ("位置", "place"), "pool": ("资源池", "pool"), "chip": ("芯片类别", "chip class"), "speed": ("实测", "measured"),
    "not_measured": ("未测", "not measured"), "region": ("区域", "region"), "moves": ("棋谱", "moves"),
    "on_board": ("盘上任务", "tasks on the board"), "none_on_board": ("盘上无子", "no stone on the board"),
    "foreign": ("他人任务", "another tenant's task"), "per_point": ("每点设备数", "devices per point"),
    "form": ("表单", "form"), "yaml": ("任务文件", "task file"), "plan": ("方案", "plan"), "options": ("可选方案", "options"),
    "go": ("落子：提交任务", "Place the stone: submit"), "chosen": ("选中", "chosen"), "strategy": ("并行策略", "strategy"),
    "cost": ("费用", "cost"), "finish": ("完成", "finish"), "odds": ("按期概率", "odds of the deadline"), "limit": ("瓶颈", "limited by"),
    "why_not": ("未选原因", "why not"), "refused": ("不可行", "refused"), "reason": ("原因", "reason"), "no_option": ("没有可行方案", "no place can run it"),
    "state": ("状态", "state"), "tenant": ("租户", "tenant"), "progress": ("进度", "progress"), "attempt": ("次", "attempt"),
    "waits": ("等待", "waits for"), "submitted": ("提交于", "submitted"), "all": ("全部", "all"), "filter": ("筛选", "filter"),
    "no_tasks": ("还没有任务", "no tasks yet"), "more": ("更多", "more"), "newest": ("最新", "newest"),
    "timeline": ("时间线", "timeline"), "why": ("为什么", "why"), "logs": ("日志", "logs"), "loss": ("损失", "loss"),
    "spent": ("已花费", "spent so far"), "hold": ("冻结", "hold"), "planned": ("计划", "planned"), "receipt": ("下载凭据", "download the receipt"),
    "cancel": ("取消任务", "cancel the task"), "would_start": ("若改变其一即可开始", "each of these alone would start it"),
    "at": ("时间", "when"), "what": ("决定", "what"), "because": ("因为", "because"), "running": ("运行中", "running"), "saved": ("已存档", "checkpointed"),
    "boards": ("棋盘树", "tree of boards"), "catalogue": ("芯片目录", "chip catalogue"), "memory": ("内存", "memory"), "bandwidth": ("带宽", "bandwidth"),
    "peak": ("峰值", "peak"), "trust": ("可信度", "confidence"), "kind": ("类型", "kind"), "vendor": ("厂商", "vendor"), "engine": ("层", "level"),
    "gang": ("最大成组", "largest gang"), "asks": ("要价曲线：台数 @ 价", "ask curve: devices @ price"), "tariff_version": ("资费版本", "tariff version"),
    "bills": ("账单", "bills"), "ledger": ("账本", "ledger"), "account": ("账户", "account"), "balance": ("余额", "balance"), "charged": ("账本入账", "charged"),
    "agrees": ("相符", "agrees"), "disagrees": ("不相符", "does not agree"), "sum": ("全部账户之和", "sum of all accounts"),
    "zero": ("为零：账本平衡", "is zero: the ledger balances"), "not_zero": ("不为零：账本有误", "is not zero: the ledger is wrong"),
    "enter": ("进入", "Enter"), "key": ("钥匙（启动时打印的网址中 # 之后）", "the key (after # in the address printed at the start)"),
    "enter_help": ("请打开启动时打印的完整网址，或在此粘贴钥匙。", "Open the whole address that was printed at the start, or paste the key here."),
    "wrong": ("出错了", "something went wrong"), "back": ("返回棋盘", "back to the board"),
    "queued": ("排队", "queued"), "reserving": ("预留中", "reserving"), "reserved": ("已预留", "reserved"), "starting": ("启动中", "starting"),
    "resizing": ("调整中", "resizing"), "stopping": ("停止中", "stopping"), "parked": ("已封盘", "parked"), "done": ("完成", "done"),
    "failed": ("失败", "failed"), "cancelled": ("已取消", "cancelled"), "resized": ("已调整", "resized"),
    "people": ("人员与密钥", "People and keys"), "you_are": ("当前身份：", "you are"), "operator": ("管理员", "the operator"),
    "keys": ("密钥", "keys"), "make_key": ("生成密钥", "Make a key"), "new_key": ("密钥只显示这一次，属于租户", "This key is shown once. It is of tenant"),
    "keys_help": ("持密钥者只能看到并使用该租户的任务与账户。", "Whoever holds a key sees and uses this tenant's tasks and account, and nothing else."),
    "submitted_count": ("累计提交", "submitted so far"), "map": ("枢纽地图", "map of the hubs"), "busy": ("运行", "busy"), "useful": ("有效时间", "useful time"),
    "spending": ("费用与计划", "cost against plan"), "rate": ("速率", "rate"), "stage": ("流水段", "stage"), "layers": ("层", "layers"), "rank": ("秩", "rank"),
    "holds": ("每秩权重份额", "weights per rank"), "matrix_part": ("矩阵分片", "part of each matrix"), "replica": ("副本", "replica"), "rows": ("行", "rows"),
    "ranks_help": ("一子一秩：数字为秩号，下为矩阵分片与每步样本行数；同色同分片。", "A stone is a rank: its number, below it the part of each matrix it holds and its rows of the batch; one colour is one part."),
    "wall": ("上墙", "Wall"), "verdicts": ("决定", "verdicts"),
    "v.placed": ("落子", "placed"), "v.waits": ("等待", "waits"), "v.shrunk": ("缩小", "shrunk"), "v.grown": ("长大", "grown"), "v.preempted": ("让位", "preempted"),
    "v.moved": ("迁移", "moved"), "v.refused": ("拒绝", "refused"), "v.restarted": ("重启", "restarted"), "v.lost": ("失去", "lost"), "v.done": ("完成", "done"),
    "v.failed": ("失败", "failed"), "v.cancelled": ("取消", "cancelled"), "v.parked": ("封盘", "parked"), "v.granted": ("准予", "granted"),
    "v.returned": ("退回", "returned"), "v.adopted": ("接管", "adopted"), "v.stopped": ("停止", "stopped"),
    "f.name": ("名称", "name"), "f.kind": ("种类", "kind"), "f.tenant": ("租户", "tenant"), "f.model": ("模型", "model"), "f.data": ("数据", "data"),
    "f.run": ("自有脚本", "own script"), "f.work.tokens": ("词元数", "tokens"), "f.work.global_batch": ("全局批", "global batch"), "f.work.seq": ("序列长", "sequence"),
    "f.devices": ("设备数", "devices"), "f.objective": ("目标", "objective"), "f.elastic": ("弹性", "elastic"), "f.limits.deadline": ("期限", "deadline"),
    "f.limits.max_cost": ("最高费用", "most it may cost"), "f.limits.time": ("时限", "time limit"), "f.limits.regions": ("区域", "regions"),
}  # fmt: skip


def word(key: str, language: str) -> str:
    """A key without an entry is shown as it is: the boards' own texts."""
    found = WORDS.get(key)
    return found[LANGUAGES.index(language)] if found else key
