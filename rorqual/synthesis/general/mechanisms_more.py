"""Mechanisms, third part: quota, maintenance, experiment, moderation, installation, rosters, loans; and the table of all."""

from __future__ import annotations

from rorqual.synthesis.general.calculus import (
    Absent,
    Action,
    Adjust,
    Arg,
    Atom,
    Clause,
    Closed,
    Closure,
    Column,
    Derived,
    Guard,
    Insert,
    Mechanism,
    Move,
    Put,
    Table,
    choice,
    day,
    number,
    ref,
)
from rorqual.synthesis.general.mechanisms import FIRST, amount, at_least, moved, thing
from rorqual.synthesis.general.mechanisms_paths import SECOND

QUOTA = Mechanism(
    "quota",
    "entitlements with an allowance and what was used of it",
    tables=(
        Table(
            "grant",
            (
                ref("party"),
                ref("item"),
                number("allowance", 40, 160),
                number("used", 0, 0),
                choice("status", "live", "live", "revoked"),
            ),
            (18, 28),
            ("grant", "entitlement", "allotment"),
            is_distinct=("party", "item"),
        ),
        Table("usage", (ref("grant"), number("units", 1, 12), day("usage_date")), (16, 28), ("usage", "usage_record")),
    ),
    actions=(
        Action(
            "consume",
            "charge {units} units to {grant}",
            (thing("grant"), amount("units", 1, 15)),
            guards=(
                Guard(Atom("grant.status", "==", "live"), "revoked"),
                at_least("grant.allowance", "grant.used", "units", "exhausted"),
            ),
            inserts=(Insert("usage", {"grant": Arg("grant"), "units": Arg("units"), "usage_date": ""}),),
            adjusts=(Adjust("grant", "used", Arg("units")),),
            verbs=("draw_units",),
        ),
        moved("revoke", "revoke {grant}", "grant", ("live",), "revoked", verbs=("withdraw_grant",)),
    ),
    derived=(Derived("grant", "used", "usage", "grant", value="units"),),
    options={
        "restore": {"actions": (moved("restore_grant", "restore {grant}", "grant", ("revoked",), "live", verbs=("reinstate",)),)},
        "raise": {
            "actions": (
                Action(
                    "set_allowance",
                    "set the allowance of {grant} to {level}",
                    (thing("grant"), amount("level", 161, 220)),
                    puts=(Put("grant", "allowance", Arg("level")),),
                    verbs=("change_allowance",),
                ),
            )
        },
        "priority": {"columns": {"grant": (number("priority", 1, 50),)}},
    },
    clauses=(Clause("consume", Atom("grant.allowance", ">=", 60)), Clause("revoke", Atom("grant.allowance", "<=", 140))),
)

MAINTENANCE = Mechanism(
    "maintenance",
    "machines that are kept running with spare parts",
    tables=(
        Table(
            "machine",
            (ref("site"), number("hours", 50, 9000), choice("status", "running", "running", "down", "retired")),
            (16, 26),
            ("machine", "unit", "rig"),
        ),
        Table(
            "part",
            (ref("item"), number("stock", 12, 40), number("used", 0, 0), number("cost", 2, 95)),
            (10, 16),
            ("part", "spare", "component_kit"),
        ),
        Table(
            "job",
            (ref("machine"), ref("part"), number("quantity", 1, 3), choice("status", "planned", "planned", "done")),
            (14, 24),
            ("job", "work_order"),
        ),
    ),
    actions=(
        Action(
            "plan_job",
            "plan a job on {machine} with {quantity} of {part}",
            (thing("machine"), thing("part"), amount("quantity", 1, 4)),
            guards=(
                Guard(Atom("machine.status", "!=", "retired"), "retired"),
                at_least("part.stock", "part.used", "quantity", "no_stock"),
            ),
            inserts=(
                Insert("job", {"machine": Arg("machine"), "part": Arg("part"), "quantity": Arg("quantity"), "status": "planned"}),
            ),
            adjusts=(Adjust("part", "used", Arg("quantity")),),
            verbs=("schedule_job",),
        ),
        moved("finish_job", "mark {job} as done", "job", ("planned",), "done", verbs=("complete_job",)),
        moved("retire", "retire {machine}", "machine", ("down",), "retired", verbs=("scrap",)),
    ),
    derived=(Derived("part", "used", "job", "part", value="quantity"),),
    options={
        "operator": {"columns": {"machine": (ref("staff"),)}},
        "repair": {
            "actions": (
                moved("put_back", "put {machine} back into service", "machine", ("down",), "running", verbs=("restart_machine",)),
            )
        },
    },
    clauses=(Clause("plan_job", Atom("part.cost", "<=", 80)), Clause("retire", Atom("machine.hours", ">=", 1000))),
)

EXPERIMENT = Mechanism(
    "experiment",
    "samples that are assayed on instruments",
    tables=(
        Table(
            "sample",
            (ref("item"), ref("site"), number("mass", 5, 120), choice("status", "stored", "stored", "reserved", "spent")),
            (18, 30),
            ("sample", "specimen", "aliquot"),
        ),
        Table(
            "instrument",
            (ref("staff"), number("max_mass", 40, 130), number("runs", 0, 0), number("precision", 1, 60)),
            (8, 14),
            ("instrument", "analyser"),
        ),
        Table(
            "assay",
            (ref("sample"), ref("instrument"), choice("result", "pending", "clear", "void")),
            (12, 22),
            ("assay", "test_run"),
        ),
    ),
    actions=(
        Action(
            "run_assay",
            "run {sample} on {instrument}",
            (thing("sample"), thing("instrument")),
            moves=(Move("sample", "status", ("stored", "reserved"), "spent"),),
            guards=(Guard(Atom("instrument.max_mass", ">=", Arg("sample.mass")), "too_heavy"),),
            inserts=(Insert("assay", {"sample": Arg("sample"), "instrument": Arg("instrument"), "result": "pending"}),),
            adjusts=(Adjust("instrument", "runs", 1),),
            verbs=("analyse",),
        ),
        moved("reserve_sample", "reserve {sample}", "sample", ("stored",), "reserved", verbs=("set_aside",)),
        Action(
            "void_assay",
            "void {assay}",
            (thing("assay"),),
            moves=(Move("assay", "result", ("pending", "clear"), "void"),),
            verbs=("strike_assay",),
        ),
    ),
    derived=(Derived("instrument", "runs", "assay", "instrument"),),
    options={
        "purity": {"columns": {"sample": (number("purity", 50, 100),)}},
        "unreserve": {
            "actions": (moved("unreserve", "release {sample}", "sample", ("reserved",), "stored", verbs=("free_sample",)),)
        },
    },
    clauses=(
        Clause("run_assay", Atom("instrument.max_mass", "<=", 125)),
        Clause("reserve_sample", Atom("sample.mass", ">=", 15)),
    ),
)

MODERATION = Mechanism(
    "moderation",
    "posts that are flagged, hidden and ruled on",
    tables=(
        Table(
            "post",
            (
                ref("party"),
                ref("item"),
                number("flags", 0, 40),
                day("posting_date"),
                choice("status", "visible", "visible", "hidden", "removed"),
            ),
            (20, 34),
            ("post", "listing", "notice"),
        ),
        Table(
            "ruling", (ref("post"), ref("staff"), choice("verdict", "keep", "hide", "remove")), (12, 22), ("ruling", "decision")
        ),
    ),
    actions=(
        moved("hide", "hide {post}", "post", ("visible",), "hidden", verbs=("take_offline",)),
        moved("remove_post", "remove {post} for good", "post", ("hidden",), "removed", verbs=("delete_for_good",)),
        Action(
            "record_ruling",
            "record that {staff} ruled to keep {post}",
            (thing("post"), thing("staff")),
            guards=(Guard(Atom("post.status", "!=", "removed"), "removed"),),
            inserts=(Insert("ruling", {"post": Arg("post"), "staff": Arg("staff"), "verdict": "keep"}),),
            verbs=("log_ruling",),
        ),
    ),
    options={
        "restore": {"actions": (moved("unhide", "show {post} again", "post", ("hidden",), "visible", verbs=("make_visible",)),)},
        "reach": {"columns": {"post": (number("reach", 10, 5000),)}},
    },
    clauses=(Clause("hide", Atom("post.flags", ">=", 3)), Clause("remove_post", Atom("post.flags", ">=", 5))),
)

REQUIRES_COMPONENT = Closed(
    "dependency", "component", "requires", "installed", "machine_host", "component", "machine_host", "component"
)
INSTALLATION = Mechanism(
    "installation",
    "components with dependencies, installed on hosts",
    tables=(
        Table(
            "machine_host", (ref("site"), number("space", 600, 1800), number("used", 0, 0)), (8, 14), ("host", "node", "server")
        ),
        Table(
            "component",
            (ref("item"), number("size", 10, 90), number("version", 1, 30)),
            (16, 24),
            ("component", "bundle", "library"),
        ),
        Table(
            "dependency",
            (ref("component"), ref("requires", "component")),
            (12, 18),
            ("dependency", "component_requirement"),
            is_distinct=("component", "requires"),
        ),
        Table(
            "installed",
            (ref("machine_host"), ref("component"), Column("size", "int", copied="component.size")),
            (10, 18),
            ("installation", "deployment"),
            is_distinct=("machine_host", "component"),
        ),
    ),
    actions=(
        Action(
            "install",
            "install {component} on {machine_host}",
            (thing("machine_host"), thing("component")),
            guards=(Guard(Atom("machine_host.space", ">=", Arg("component.size"), minus="machine_host.used"), "no_space"),),
            absent=(Absent("installed", {"machine_host": Arg("machine_host"), "component": Arg("component")}),),
            closed=(REQUIRES_COMPONENT,),
            inserts=(
                Insert(
                    "installed",
                    {"machine_host": Arg("machine_host"), "component": Arg("component"), "size": Arg("component.size")},
                ),
            ),
            adjusts=(Adjust("machine_host", "used", Arg("component.size")),),
            verbs=("deploy",),
            is_bulk=False,
        ),
    ),
    derived=(Derived("machine_host", "used", "installed", "machine_host", value="size"),),
    options={
        "space": {
            "actions": (
                Action(
                    "grow",
                    "grow {machine_host} to {space} units of space",
                    (thing("machine_host"), amount("space", 1801, 2400)),
                    puts=(Put("machine_host", "space", Arg("space")),),
                    verbs=("expand_host",),
                ),
            )
        },
        "load": {"columns": {"machine_host": (number("cores", 1, 64),)}},
    },
    clauses=(Clause("install", Atom("component.version", ">=", 3)),),
    plans=(Closure("install", REQUIRES_COMPONENT),),
)

ROSTER = Mechanism(
    "roster",
    "shifts that must be filled by the right people",
    tables=(
        Table(
            "shift",
            (ref("site"), day("shift_date"), number("needed", 3, 8), number("filled", 0, 0), number("pay", 60, 260)),
            (18, 28),
            ("shift", "watch", "duty"),
        ),
        Table(
            "duty_entry", (ref("shift"), ref("staff")), (14, 24), ("duty_entry", "roster_line"), is_distinct=("shift", "staff")
        ),
    ),
    actions=(
        Action(
            "put_on",
            "put {staff} on {shift}",
            (thing("shift"), thing("staff")),
            guards=(Guard(Atom("shift.filled", "<", Arg("shift.needed")), "filled"),),
            absent=(Absent("duty_entry", {"shift": Arg("shift"), "staff": Arg("staff")}),),
            inserts=(Insert("duty_entry", {"shift": Arg("shift"), "staff": Arg("staff")}),),
            adjusts=(Adjust("shift", "filled", 1),),
            verbs=("roster", "staff_shift"),
        ),
        Action(
            "set_pay",
            "set the pay of {shift} to {pay}",
            (thing("shift"), amount("pay", 261, 320)),
            puts=(Put("shift", "pay", Arg("pay")),),
            verbs=("change_pay",),
        ),
    ),
    derived=(Derived("shift", "filled", "duty_entry", "shift"),),
    options={
        "night": {"columns": {"shift": (choice("period", "early", "late", "night"),)}},
        "swap": {
            "actions": (
                Action(
                    "hand_shift",
                    "give {duty_entry} to {staff}",
                    (thing("duty_entry"), thing("staff")),
                    puts=(Put("duty_entry", "staff", Arg("staff")),),
                    verbs=("swap_shift",),
                ),
            )
        },
    },
    clauses=(Clause("put_on", Atom("shift.pay", "<=", 240)),),
)

LOANS = Mechanism(
    "loans",
    "titles whose copies are lent out and come back",
    tables=(
        Table(
            "title",
            (ref("item"), ref("site"), number("copies", 3, 7), number("lent", 0, 0), number("condition", 1, 40)),
            (18, 28),
            ("title", "volume", "kit"),
        ),
        Table(
            "loan",
            (ref("title"), ref("party"), day("due_date"), number("renewals", 0, 9), choice("status", "open", "open", "returned")),
            (16, 26),
            ("loan", "lending"),
        ),
    ),
    actions=(
        Action(
            "lend",
            "lend {title} to {party}",
            (thing("title"), thing("party")),
            guards=(Guard(Atom("title.lent", "<", Arg("title.copies")), "all_out"),),
            inserts=(
                Insert("loan", {"title": Arg("title"), "party": Arg("party"), "due_date": "", "renewals": 0, "status": "open"}),
            ),
            adjusts=(Adjust("title", "lent", 1),),
            verbs=("issue_loan",),
        ),
        moved(
            "take_return",
            "take back {loan}",
            "loan",
            ("open",),
            "returned",
            adjusts=(Adjust("loan.title", "lent", 1, -1),),
            verbs=("check_in",),
        ),
    ),
    derived=(Derived("title", "lent", "loan", "title", state="status", states=("open",)),),
    options={
        "moving": {
            "actions": (
                Action(
                    "move_title",
                    "move {title} to {site}",
                    (thing("title"), thing("site")),
                    guards=(Guard(Atom("title.lent", "==", 0), "lent_out"),),
                    puts=(Put("title", "site", Arg("site")),),
                    verbs=("relocate",),
                ),
            )
        },
        "fee": {"columns": {"title": (number("fee", 0, 60),)}},
    },
    clauses=(Clause("lend", Atom("title.condition", ">=", 4)), Clause("take_return", Atom("loan.renewals", "<=", 7))),
)

MECHANISMS = {
    mechanism.name: mechanism
    for mechanism in (*FIRST, *SECOND, QUOTA, MAINTENANCE, EXPERIMENT, MODERATION, INSTALLATION, ROSTER, LOANS)
}
"""name -> mechanism, fifteen of them."""
