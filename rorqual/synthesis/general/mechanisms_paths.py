"""Mechanisms, second part, those of order and rank: enrolment, routes, approval."""

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
    Derived,
    Guard,
    Insert,
    Mechanism,
    Move,
    Path,
    Put,
    Table,
    choice,
    day,
    number,
    ref,
)
from rorqual.synthesis.general.mechanisms import amount, moved, same, thing

REQUIRES_COURSE = Closed("prerequisite", "course", "requires", "enrolment", "party", "course", "party", "course")
ENROLMENT = Mechanism(
    "enrolment",
    "courses with prerequisites and limited places",
    tables=(
        Table(
            "course",
            (ref("item"), number("places", 6, 14), number("enrolled", 0, 0), number("credits", 1, 12), day("start_date")),
            (14, 22),
            ("course", "module", "training"),
        ),
        Table(
            "prerequisite",
            (ref("course"), ref("requires", "course")),
            (10, 16),
            ("prerequisite", "course_requirement"),
            is_distinct=("course", "requires"),
        ),
        Table(
            "enrolment",
            (ref("party"), ref("course")),
            (12, 20),
            ("enrolment", "registration"),
            is_distinct=("party", "course"),
        ),
    ),
    actions=(
        Action(
            "enrol",
            "enrol {party} in {course}",
            (thing("party"), thing("course")),
            guards=(Guard(Atom("course.enrolled", "<", Arg("course.places")), "full"),),
            absent=(Absent("enrolment", {"party": Arg("party"), "course": Arg("course")}),),
            closed=(REQUIRES_COURSE,),
            inserts=(Insert("enrolment", {"party": Arg("party"), "course": Arg("course")}),),
            adjusts=(Adjust("course", "enrolled", 1),),
            verbs=("register",),
            is_bulk=False,
        ),
    ),
    derived=(Derived("course", "enrolled", "enrolment", "course"),),
    options={
        "room": {"columns": {"course": (ref("site"),)}},
        "places": {
            "actions": (
                Action(
                    "extend_places",
                    "raise the places of {course} to {places}",
                    (thing("course"), amount("places", 15, 24)),
                    puts=(Put("course", "places", Arg("places")),),
                    verbs=("enlarge_course",),
                ),
            )
        },
    },
    clauses=(Clause("enrol", Atom("course.credits", "<=", 10)),),
    plans=(Closure("enrol", REQUIRES_COURSE),),
)

ROUTES = Mechanism(
    "routes",
    "consignments that travel over legs between places",
    tables=(
        Table(
            "leg",
            (ref("origin", "site"), ref("destination", "site"), number("minutes", 15, 400), number("cost", 4, 120)),
            (26, 38),
            ("leg", "link", "connection"),
            is_distinct=("origin", "destination"),
        ),
        Table(
            "consignment",
            (ref("party"), ref("location", "site"), number("weight", 1, 80), choice("status", "waiting", "held", "waiting")),
            (12, 18),
            ("consignment", "shipment", "parcel"),
        ),
        Table("hop", (ref("consignment"), ref("leg")), (6, 12), ("hop", "leg_record")),
    ),
    actions=(
        Action(
            "send",
            "send {consignment} over {leg}",
            (thing("consignment"), thing("leg")),
            guards=(
                Guard(Atom("consignment.status", "==", "waiting"), "held"),
                same("leg.origin", "consignment.location", "wrong_place"),
            ),
            puts=(Put("consignment", "location", Arg("leg.destination")),),
            inserts=(Insert("hop", {"consignment": Arg("consignment"), "leg": Arg("leg")}),),
            verbs=("forward_over", "dispatch_leg"),
            is_bulk=False,
        ),
        moved("hold", "hold {consignment}", "consignment", ("waiting",), "held", verbs=("stop_consignment",)),
    ),
    options={
        "release": {
            "actions": (moved("release", "release {consignment}", "consignment", ("held",), "waiting", verbs=("let_go",)),)
        },
        "carrier": {"columns": {"leg": (choice("carrier", "rail", "road", "air", "sea"),)}},
    },
    clauses=(Clause("hold", Atom("consignment.weight", ">=", 10)),),
    plans=(Path("send", "consignment", "leg", "leg", "origin", "destination", "location", ("cost", "minutes")),),
)

APPROVAL = Mechanism(
    "approval",
    "requests that climb an approval chain",
    tables=(
        Table(
            "approver",
            (ref("staff"), number("limit", 100, 900), choice("desk_state", "available", "available", "away")),
            (8, 14),
            ("approver", "signatory"),
        ),
        Table(
            "request",
            (
                ref("party"),
                number("amount", 40, 800),
                day("filing_date"),
                ref("approver", null_in=("submitted",)),
                choice("status", "submitted", "submitted", "approved", "rejected"),
            ),
            (20, 32),
            ("request", "claim", "application"),
        ),
    ),
    actions=(
        Action(
            "approve",
            "have {request} approved by {approver}",
            (thing("request"), thing("approver")),
            moves=(Move("request", "status", ("submitted",), "approved"),),
            guards=(
                Guard(Atom("approver.desk_state", "==", "available"), "away"),
                Guard(Atom("approver.limit", ">=", Arg("request.amount")), "above_limit"),
            ),
            puts=(Put("request", "approver", Arg("approver")),),
            verbs=("sign_off",),
        ),
        moved("reject", "reject {request}", "request", ("submitted",), "rejected", verbs=("turn_down",)),
    ),
    options={
        "appeal": {
            "actions": (moved("reopen", "reopen {request}", "request", ("rejected",), "submitted", verbs=("hear_appeal",)),)
        },
        "risk": {"columns": {"request": (number("risk", 1, 99),)}},
    },
    clauses=(Clause("approve", Atom("approver.limit", "<=", 850)), Clause("reject", Atom("request.amount", ">=", 80))),
)

SECOND = (ENROLMENT, ROUTES, APPROVAL)
