"""A small file in each format that labels come in, true to the real layouts, and what it says."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lofi_fast.data.annotations import FormatOptions, Segment

Videos = dict[str, tuple[str, float | None, list[tuple[float, float, str]]]]
TRAIN, VAL, TEST, NONE = "training", "validation", "testing", "unassigned"


@dataclass(frozen=True)
class Sample:
    """`videos`: name -> (subset, duration, segments). `says`: parts of its notes. `beside`: other files."""

    file: str
    text: str
    videos: Videos
    says: tuple[str, ...] = ()
    options: FormatOptions = field(default_factory=FormatOptions)
    beside: tuple[tuple[str, str], ...] = ()

    def write(self, folder: Path) -> Path:
        for name, text in (*self.beside, (self.file, self.text)):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text)
        return folder / self.file


def segments(listed: list[tuple[float, float, str]]) -> tuple[Segment, ...]:
    return tuple(Segment(*one) for one in listed)


def dumped(content: Any) -> str:
    return json.dumps(content)


BORIS_PROJECT = {
    "project_format_version": "7.0",
    "behaviors_conf": {
        "0": {"type": "State event", "code": "groom"},
        "1": {"type": "Point event", "code": "bite"},
        "2": {"type": "State event with coding map", "code": "walk"},
    },
    "observations": {
        "morning": {
            "type": "MEDIA",
            "file": {"1": ["C:\\data\\a.mp4", "C:\\data\\b.mp4"], "2": ["C:\\data\\side.mp4"]},
            "time offset": 100.0,
            "events": [
                [101.0, "m1", "groom", "", ""],
                [102.0, "m2", "groom", "", "another animal meanwhile"],
                [103.0, "m1", "groom", "", ""],
                [104.5, "m2", "groom", "", "", 7],
                [105.0, "m1", "bite", "tail|left", ""],
                [108.0, "", "walk", "fast", "passes the end of the first file"],
                [112.0, "", "walk", "fast", ""],
                [113.0, "", "walk", "slow", "never stopped"],
                [114.0, "", "yawn", "", "not in the ethogram"],
            ],
            "media_info": {"length": {"C:\\data\\a.mp4": 10.0, "C:\\data\\b.mp4": 20.0}},
        },
        "live": {"type": "LIVE", "file": [], "events": [[1.0, "", "bite", "", ""]]},
        "empty": {"type": "MEDIA", "file": {"1": ["/c.mp4"]}, "time offset": 0.0, "events": [], "media_info": {}},
    },
}
BORIS_8 = "\t".join((
    "Observation id", "Observation date", "Description", "Observation type", "Source", "Time offset (s)",
    "Coding duration", "Media duration (s)", "FPS (frame/s)", "weather", "Subject",
    "Observation duration by subject by observation", "Behavior", "Behavioral category", "Modifier #1", "Behavior type",
    "Start (s)", "Stop (s)", "Duration (s)", "Media file name", "Image index start", "Image index stop",
    "Image file path start", "Image file path stop", "Comment start", "Comment stop",
))  # fmt: skip


def boris_8(behavior: str, kind: str, start: float, stop: float, medium: str) -> str:
    source = "player #1:a.mp4;b.mp4|player #2:side.mp4"
    return "\t".join((
        "one", "2024-01-01 10:00:00", "", "Media file", source, "0.0", "25.000", "10.000;20.000|30.000",
        "25.000;25.000|25.000", "dry", "m1", "9.0", behavior, "Not defined", "", kind, f"{start:.3f}", f"{stop:.3f}",
        "NA", medium, "25", "50", "", "", "", "",
    ))  # fmt: skip


EAF = """<?xml version="1.0" encoding="UTF-8"?>
<ANNOTATION_DOCUMENT AUTHOR="" DATE="2024-01-01T00:00:00+00:00" FORMAT="3.0" VERSION="3.0">
  <HEADER MEDIA_FILE="" TIME_UNITS="milliseconds">
    <MEDIA_DESCRIPTOR MEDIA_URL="file:///home/me/s.wav" MIME_TYPE="audio/x-wav"/>
    <MEDIA_DESCRIPTOR MEDIA_URL="file:///home/me/cooking.mp4" MIME_TYPE="video/mp4" TIME_ORIGIN="500"/>
  </HEADER>
  <TIME_ORDER>
    <TIME_SLOT TIME_SLOT_ID="t1" TIME_VALUE="1000"/><TIME_SLOT TIME_SLOT_ID="t2"/>
    <TIME_SLOT TIME_SLOT_ID="t3" TIME_VALUE="4000"/><TIME_SLOT TIME_SLOT_ID="t4" TIME_VALUE="6000"/>
  </TIME_ORDER>
  <TIER TIER_ID="hands" LINGUISTIC_TYPE_REF="t">
    <ANNOTATION><ALIGNABLE_ANNOTATION ANNOTATION_ID="a1" TIME_SLOT_REF1="t1" TIME_SLOT_REF2="t2">
      <ANNOTATION_VALUE>stir</ANNOTATION_VALUE></ALIGNABLE_ANNOTATION></ANNOTATION>
    <ANNOTATION><ALIGNABLE_ANNOTATION ANNOTATION_ID="a2" TIME_SLOT_REF1="t2" TIME_SLOT_REF2="t3">
      <ANNOTATION_VALUE>pour</ANNOTATION_VALUE></ALIGNABLE_ANNOTATION></ANNOTATION>
    <ANNOTATION><ALIGNABLE_ANNOTATION ANNOTATION_ID="a3" TIME_SLOT_REF1="t3" TIME_SLOT_REF2="t4">
      <ANNOTATION_VALUE/></ALIGNABLE_ANNOTATION></ANNOTATION>
  </TIER>
  <TIER TIER_ID="tool" PARENT_REF="hands" LINGUISTIC_TYPE_REF="r">
    <ANNOTATION><REF_ANNOTATION ANNOTATION_ID="a4" ANNOTATION_REF="a3">
      <ANNOTATION_VALUE>spoon</ANNOTATION_VALUE></REF_ANNOTATION></ANNOTATION>
    <ANNOTATION><REF_ANNOTATION ANNOTATION_ID="a5" ANNOTATION_REF="a3" PREVIOUS_ANNOTATION="a4">
      <ANNOTATION_VALUE>knife</ANNOTATION_VALUE></REF_ANNOTATION></ANNOTATION>
  </TIER>
  <LINGUISTIC_TYPE LINGUISTIC_TYPE_ID="t" TIME_ALIGNABLE="true"/>
</ANNOTATION_DOCUMENT>
"""
LABEL_STUDIO = [
    {
        "id": 7,
        "data": {"video": "/data/upload/1/0a1b2c3d-walk%201.mp4"},
        "annotations": [
            {
                "was_cancelled": False,
                "result": [
                    {"type": "timelinelabels", "value": {
                        "ranges": [{"start": 1, "end": 50}, {"start": 76, "end": 76}], "timelinelabels": ["Run"],
                    }},
                    {"type": "choices", "value": {"choices": ["good"]}},
                ],
            },
            {"was_cancelled": True, "result": [{"value": {"ranges": [], "timelinelabels": ["No"]}}]},
        ],
    },
    {"id": 8, "data": {"video": "s3://bucket/b.mp4"}, "annotations": [
        {"result": [{"type": "labels", "value": {"start": 1.5, "end": 2.5, "channel": 0, "labels": ["Talk"]}}]},
    ]},
]  # fmt: skip
VIA_ATTRIBUTE = {"1": {"aname": "activity", "anchor_id": "FILE1_Z2_XY0", "type": 4, "options": {"B": "break egg"}},
                 "2": {"aname": "comment", "anchor_id": "FILE1_Z2_XY0", "type": 1, "options": {}}}  # fmt: skip
VIA = {
    "project": {"pname": "p", "vid_list": ["1"]},
    "attribute": VIA_ATTRIBUTE,
    "file": {"1": {"fid": "1", "fname": "egg.mp4", "type": 4, "loc": 1, "src": ""}},
    "metadata": {
        "1_a": {"vid": "1", "flg": 0, "z": [1.25, 3.5], "xy": [], "av": {"1": "B"}},
        "1_b": {"vid": "1", "flg": 0, "z": [4.0], "xy": [], "av": {"2": "smoke"}},
        "1_c": {"vid": "1", "flg": 0, "z": [4.0], "xy": [2, 1, 1, 5, 5], "av": {"1": "B"}},
        "1_d": {"vid": "1", "flg": 0, "z": [5.0, 6.0], "xy": [], "av": {}},
    },
    "view": {"1": {"fid_list": ["1"]}},
}
VIA_CSV = (
    "# Exported using VGG Image Annotator\n# Notes:\n# - temporal coordinate of [1.349,2.741] denotes a segment\n"
    f"# ATTRIBUTE = {json.dumps(VIA_ATTRIBUTE)}\n"
    "# CSV_HEADER = metadata_id,file_list,flags,temporal_coordinates,spatial_coordinates,metadata\n"
    '"1_a","[""egg.mp4""]",0,"[1.25,3.5]","[]","{""1"":""B""}"\n'
)
CVAT = """<annotations><version>1.1</version>
<meta><task><id>3</id><name>t</name><size>100</size><frame_filter>step=2</frame_filter><source>yard.mp4</source></task></meta>
<track id="0" label="dog" task_id="3">
  <box frame="10" outside="0" keyframe="1" xtl="0" ytl="0" xbr="1" ybr="1"><attribute name="state">sit</attribute></box>
  <box frame="20" outside="0" keyframe="1" xtl="0" ytl="0" xbr="1" ybr="1"><attribute name="state">run</attribute></box>
  <box frame="30" outside="1" keyframe="1" xtl="0" ytl="0" xbr="1" ybr="1"/>
  <box frame="60" outside="0" keyframe="1" xtl="0" ytl="0" xbr="1" ybr="1"/>
  <box frame="62" outside="0" keyframe="1" xtl="0" ytl="0" xbr="1" ybr="1"/>
</track></annotations>
"""
CHOLECT50 = {
    "video": 1, "fps": 1, "num_frames": 4,
    "categories": {
        "instrument": {"0": "grasper", "1": "hook"}, "verb": {"0": "grasp"}, "target": {"0": "gallbladder"},
        "triplet": {"0": "grasper,grasp,gallbladder", "1": "hook,grasp,gallbladder"}, "phase": {"0": "preparation"},
    },
    "annotations": {
        "0": [[0, 0, 1, -1, -1, -1, -1, 0, 0, -1, -1, -1, -1, -1, 0]],
        "1": [[0, 0, 1, -1, -1, -1, -1, 0, 0, -1, -1, -1, -1, -1, 0],
              [1, 1, 1, -1, -1, -1, -1, 0, 0, -1, -1, -1, -1, -1, 0]],
        "2": [[-1, -1, 1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, 0]],
        "3": [[0, 0, 1, -1, -1, -1, -1, 0, 0, -1, -1, -1, -1, -1, 0]],
    },
}  # fmt: skip
EPIC = (
    "narration_id,participant_id,video_id,narration_timestamp,start_timestamp,stop_timestamp,start_frame,stop_frame,"
    "narration,verb,verb_class,noun,noun_class,all_nouns,all_noun_classes\n"
    "P01_1_0,P01,P01_1,00:00:00.56,00:00:01.50,00:00:02.75,1,2,take plate,take,0,plate,2,['plate'],[2]\n"
    "P01_1_1,P01,P01_1,00:01:00.00,00:01:00.00,01:01:02.50,1,2,\"pick up, again\",pick-up,0,plate,2,['plate'],[2]\n"
    "P01_1_2,P01,P01_1,00:02:00.00,00:02:00.00,00:02:01.00,1,2,take lid,take,0,lid,5,['lid'],[5]\n"
)
EGO4D = {
    "version": "1", "videos": [{
        "video_uid": "u", "split": "val", "clips": [{
            "clip_uid": "c", "video_start_sec": 100.0, "video_end_sec": 580.0,
            "annotations": [{"annotator_uid": "x", "labels": [
                {"start_time": 1.5, "end_time": 4.0, "video_start_time": 101.5, "video_end_time": 104.0,
                 "label": "use_phone", "primary": True},
                {"start_time": 2.0, "end_time": 4.0, "label": "use_phone", "primary": False},
            ]}],
        }],
    }],
}  # fmt: skip
SOCCER = {
    "UrlLocal": "england_epl/2014-2015/2015-02-21 - 18-00 Chelsea 1 - 1 Burnley/",
    "annotations": [
        {"gameTime": "1 - 00:05", "label": "Kick-off", "position": "5125", "team": "home", "visibility": "visible"},
        {"gameTime": "2 - 45:00", "label": "Goal", "position": "2700000", "team": "away", "visibility": "not shown"},
    ],
}
GAME = "england_epl/2014-2015/2015-02-21 - 18-00 Chelsea 1 - 1 Burnley"
OSL = {
    "version": "2.0", "task": "action_spotting", "labels": {"action": {"type": "single_label", "labels": ["PASS"]}},
    "data": [
        {"id": "1", "split": "valid", "inputs": [{"type": "video", "path": "game1/224p.mp4", "fps": 25.0}],
         "events": [{"head": "action", "label": "PASS", "position_ms": 1240}]},
        {"id": "2", "split": "valid", "inputs": [{"type": "video", "path": "game2/224p.mp4", "fps": 25.0}],
         "events": []},
    ],
}  # fmt: skip
OSL_HEADS = {"version": "2.0", "data": [
    {"split": "train", "inputs": [{"type": "video", "path": "a.mp4"}], "events": [
        {"head": "action", "label": "PASS", "position_ms": 1240},
        {"head": "team", "label": "left", "position_ms": 1240},
    ]},
    {"split": "train", "inputs": [{"type": "video", "path": "b.mp4"}], "events": [
        {"head": "team", "label": "right", "position_ms": 2000},
    ]},
    {"split": "challenge", "inputs": [{"type": "video", "path": "c.mp4"}], "events": []},
]}  # fmt: skip
OSL_1 = {"version": 1, "labels": ["PASS"], "videos": [
    {"path": "game1/720p.mp4", "annotations": [{"label": "PASS", "position": "500", "gameTime": "1 - 00:00"}]},
]}  # fmt: skip
SPOT = [{"video": "rally", "num_frames": 100, "fps": 25.0, "num_events": 1, "width": 1, "height": 1,
         "events": [{"frame": 50, "label": "serve", "comment": ""}]}]  # fmt: skip
ACTIONS = {"v1": {"subset": "training", "duration": 20.5, "actions": [[0, 1.0, 2.5], [4, 1.5, 9.0]]},
           "v2": {"subset": "testing", "duration": 10.0, "actions": []}}  # fmt: skip
HACS = (
    "classname,youtube_id,subset,start,end,label\nArchery,abc,training,1.0,3.0,1\nArchery,abc,training,5.0,7.0,-1\n"
    "Archery,def,validation,0.0,2.0,1\n"
)
CHARADES = (
    "id,subject,scene,quality,relevance,verified,script,objects,descriptions,actions,length\n"
    '46GP8,HR43,Kitchen,6,7,Yes,"A person, cooking.",food,"x; y",c092 11.90 21.20;c147 0.00 12.60,24.83\n'
    "N11GT,0KZ7,Stairs,7,7,No,Text,,Text,,18.33\n"
)
FRAMES = "SIL\nSIL\ntake_cup\ntake_cup\ntake_cup\npour_milk\nSIL\n"
FINEACTION = {"version": "1", "database": {
    "v_1": {"filename": "v_1.mp4", "duration": 12.0, "fps": 30.0, "subset": "training", "nframes": 360,
            "annotations": [{"label": "wrap", "label_id": 3, "segment": [1.0, 2.0]}]},
}}  # fmt: skip

SAMPLES: dict[str, Sample] = {
    "FineAction": Sample("fineaction.json", dumped(FINEACTION), {"v_1": (TRAIN, 12.0, [(1.0, 2.0, "wrap")])}),
    "BORIS project": Sample(
        "p.boris", dumped(BORIS_PROJECT),
        {
            "a": (NONE, 10.0, [(1.0, 3.0, "groom"), (2.0, 4.5, "groom"), (5.0, 5.0, "bite"), (8.0, 10.0, "walk")]),
            "b": (NONE, 20.0, [(0.0, 2.0, "walk")]),
            "c": (NONE, None, []),
        },
        ("1 observation without media", "1 state event without a pair dropped (1 of walk)", "1 player beside the first",
         "1 event of behaviours that are not in the ethogram"),
    ),
    "BORIS project by dates": Sample(
        "p.boris", dumped({**BORIS_PROJECT, "observations": {"morning": {
            "type": "MEDIA", "file": {"1": ["C:/data/a.mp4", "C:/data/b.mp4"]}, "time offset": 0.0,
            "media_creation_date_as_offset": True,
            "media_info": {"length": {"C:/data/a.mp4": 10.0, "C:/data/b.mp4": 20.0},
                           "media_creation_time": {"C:/data/a.mp4": 1600000000, "C:/data/b.mp4": 1600003600}},
            "events": [
                [1600000001.0, "", "groom", "", ""], [1600000003.5, "", "groom", "", ""],
                [1600003600.25, "", "bite", "", ""], [1600003620.0, "", "bite", "", ""],
                [1600000500.0, "", "bite", "", "between the files"],
                [1600000008.0, "", "walk", "", ""], [1600003602.0, "", "walk", "", ""],
            ],
        }}}),
        {
            "a": (NONE, 10.0, [(1.0, 3.5, "groom"), (8.0, 10.0, "walk")]),
            "b": (NONE, 20.0, [(0.25, 0.25, "bite"), (0.0, 2.0, "walk"), (20.0, 20.0, "bite")]),
        },
        ("1 segment dropped: the times are dates",),
    ),
    "BORIS 8 aggregated": Sample(
        "events.tsv",
        "\n".join((BORIS_8, boris_8("groom", "STATE", 8, 12, "a.mp4"), boris_8("bite", "POINT", 15, 15, "b.mp4"))),
        {"a": (NONE, 10.0, [(8.0, 10.0, "groom")]), "b": (NONE, 20.0, [(0.0, 2.0, "groom"), (5.0, 5.0, "bite")])},
    ),
    "BORIS 7 aggregated": Sample(
        "events.csv",
        "Observation id,Observation date,Description,Media file,Total length,FPS,Subject,Behavior,Behavioral category,"
        "Modifiers,Behavior type,Start (s),Stop (s),Duration (s),Comment start,Comment stop\n"
        "o,2016-12-01,,d/a.mp4,30.000,25.0,,s,,,STATE,1.800,8.125,6.325,,\n"
        "o,2016-12-01,,d/b.mp4,30.000,25.0,,p,,,POINT,12.000,12.000,NA,,\n"
        "l,2016-12-01,,NA,NA,NA,,p,,,POINT,12.000,12.000,NA,,\n",
        {"a": (NONE, None, [(1.8, 8.125, "s")]), "b": (NONE, None, [])},
        ("1 segment dropped: media are played one after the other", "give --videos", "1 row without a media file"),
    ),
    "BORIS 7 aggregated beside its project": Sample(
        "events.tsv",
        "Observation id\tMedia file\tTotal length\tFPS\tSubject\tBehavior\tBehavior type\tStart (s)\tStop (s)\n"
        "morning\tC:\\data\\a.mp4\t30\t25\t\ts\tSTATE\t1.8\t8.125\n"
        "morning\tC:\\data\\b.mp4\t30\t25\t\tp\tPOINT\t12\t12\n",
        {"a": (NONE, 10.0, [(1.8, 8.125, "s")]), "b": (NONE, 20.0, [(2.0, 2.0, "p")])},
        beside=(("p.boris", dumped(BORIS_PROJECT)),),
    ),
    "BORIS 8.5 aggregated": Sample(
        "events.tsv",
        "Observation id\tObservation type\tSource\tSubject\tBehavior\tBehavior type\tStart (s)\tStop (s)\n"
        "one\tMedia file\tplayer #1: C:/v/a 1.mp4; player #2: side.mp4; \tm1\tgroom\tSTATE\t1.000\t3.500\n"
        "one\tMedia file\tplayer #1: C:/v/a 1.mp4; player #2: side.mp4; \tm1\tbite\tPOINT\t2.000\t2.000\n"
        "two\tLive observation\tNA\tm1\tbite\tPOINT\t2.000\t2.000\n"
        "three\tFrom pictures\td1; d2; \tm1\tbite\tPOINT\t2.000\t2.000\n",
        {"a 1": (NONE, None, [(1.0, 3.5, "groom"), (2.0, 2.0, "bite")])}, ("2 rows without a media file",),
    ),
    "BORIS 8.5 tabular": Sample(
        "events.tsv",
        "Observation id\tObservation type\tSource\tSubject\tBehavior\tBehavior type\tTime\tMedia file name\n"
        + "".join(f"one\tMedia file(s)\tplayer #1: a.mp4;b.mp4 player #2: side.mp4\tm1\t{event}\n" for event in (
            "groom\tSTART\t1.0\ta.mp4", "groom\tSTOP\t3.5\ta.mp4", "walk\tSTART\t4.0\ta.mp4",
            "walk\tSTOP\t12.0\tb.mp4")),
        {"a": (NONE, None, [(1.0, 3.5, "groom")]), "b": (NONE, None, [])}, ("1 segment dropped: media are played",),
    ),
    "BORIS tabular": Sample(
        "t.tsv",
        "Observation id\tobservation #1\t\t\t\t\t\t\t\nMedia file(s)\t\t\t\t\t\t\t\t\nPlayer #1\tv.mp4\n\n"
        "Time\tMedia file path\tTotal length\tFPS\tSubject\tBehavior\tBehavioral category\tComment\tStatus\n"
        "3.300\tv.mp4\t359.960\t25.0\ts1\teat\t\t\tSTART\n4.000\tv.mp4\t359.960\t25.0\ts1\thit\t\t\tPOINT\n"
        "7.750\tv.mp4\t359.960\t25.0\ts1\teat\t\t\tSTOP\n9.0\tv.mp4\t359.960\t25.0\ts1\teat\t\t\tSTART\n",
        {"v": (NONE, 359.96, [(4.0, 4.0, "hit"), (3.3, 7.75, "eat")])}, ("1 state event without a pair",),
    ),
    "BORIS tabular of a part of an observation": Sample(
        "t.tsv",
        "Time\tMedia file path\tTotal length\tSubject\tBehavior\tStatus\n" + "".join(
            f"{at}\tv.mp4\t99.0\t\teat\t{status}\n" for at, status in (
                (5, "STOP"), (10, "START"), (15, "START"), (15, "STOP"), (20, "STOP"), (30, "START"), (40, "START"),
                (50, "STOP"), (60, "START"), (60, "STOP"))),
        {"v": (NONE, 99.0, [(10.0, 15.0, "eat"), (15.0, 20.0, "eat"), (40.0, 50.0, "eat"), (60.0, 60.0, "eat")])},
        ("2 state events without a pair dropped (2 of eat)",),
    ),
    "BORIS 7 tabular of several media, with an offset": Sample(
        "t.csv",
        "Observation id,o,,,,\n,,,,,\nPlayer #1,\"C:/v/a, 1.mp4\",,,,\nPlayer #1,b.mp4,,,,\nPlayer #2,c.mp4,,,,\n"
        "Time offset (s),100.0,,,,\n,,,,,\nTime,Media file path,FPS,Subject,Behavior,Status\n"
        "112.5,b.mp4,25.0,,eat,START\n115.0,b.mp4,25.0,,eat,STOP\n",
        {"a, 1": (NONE, 10.0, []), "b": (NONE, 20.0, [(2.5, 5.0, "eat")])},
        beside=(("p.boris", dumped({"behaviors_conf": {}, "observations": {"x": {
            "media_info": {"length": {"C:/v/a, 1.mp4": 10.0, "b.mp4": 20.0}}}}})),),
    ),
    "ELAN": Sample(
        "e.eaf", EAF, {"cooking": (NONE, None, [(1.5, 3.0, "stir"), (3.0, 4.5, "pour"), (4.5, 6.5, "hands")])},
        ("1 tier left out, which --tiers can name: tool", "2 annotations with a time slot without value"),
    ),
    "ELAN with a video of unknown type": Sample(
        "e.eaf", EAF.replace('"video/mp4"', '"unknown"').replace("cooking.mp4", "cooking.mkv"),
        {"cooking": (NONE, None, [(1.5, 3.0, "stir"), (3.0, 4.5, "pour"), (4.5, 6.5, "hands")])},
    ),
    "ELAN of before": Sample(
        "e.eaf",
        re.sub(r"<MEDIA_DESCRIPTOR[^>]*>", "", EAF).replace('MEDIA_FILE=""', 'MEDIA_FILE="file:///D:/v/cooking.mpg"'),
        {"cooking": (NONE, None, [(1.0, 2.5, "stir"), (2.5, 4.0, "pour"), (4.0, 6.0, "hands")])},
    ),
    "ELAN of two lines": Sample(
        "e.eaf", EAF.replace(">pour<", ">pour\r\n\n milk<"),
        {"cooking": (NONE, None, [(1.5, 3.0, "stir"), (3.0, 4.5, "pour milk"), (4.5, 6.5, "hands")])},
    ),
    "ELAN tiers": Sample(
        "e.eaf", EAF, {"cooking": (NONE, None, [(4.5, 5.5, "spoon"), (5.5, 6.5, "knife")])},
        options=FormatOptions(tiers=("tool",)),
    ),
    "Label Studio": Sample(
        "ls.json", dumped(LABEL_STUDIO),
        {"walk 1": (NONE, None, [(0.0, 2.0, "Run"), (3.0, 3.04, "Run")]), "b": (NONE, None, [(1.5, 2.5, "Talk")])},
        ("frames from 1, 25 a second",), FormatOptions(fps=25),
    ),
    "Label Studio JSON-MIN": Sample(
        "min.json", dumped([{"id": 1, "video": "/data/upload/1/w.mp4", "videoLabels": [
            {"ranges": [{"start": 11, "end": 20}], "timelinelabels": ["Sit", "Talk"]}]}]),
        {"w": (NONE, None, [(1.0, 2.0, "Sit"), (1.0, 2.0, "Talk")])}, options=FormatOptions(fps=10),
    ),
    "Label Studio, frames of its setup": Sample(
        "ls.json", dumped([
            {"id": 1, "data": {"video": "a.mp4", "fps": 10}, "annotations": [{"result": [
                {"type": "timelinelabels", "value": {"ranges": [{"start": 11, "end": 20}], "timelinelabels": ["Sit"]}},
            ]}]},
            {"id": 2, "data": {"video": "b.mp4"}, "annotations": [{"result": [
                {"type": "videorectangle", "value": {"sequence": [], "framesCount": 480, "duration": 20.0}},
                {"type": "timelinelabels", "value": {"ranges": [{"start": 25, "end": 48}], "timelinelabels": ["Run"]}},
            ]}]},
        ]),
        {"a": (NONE, None, [(1.0, 2.0, "Sit")]), "b": (NONE, None, [(1.0, 2.0, "Run")])},
        ("frames from 1, 10, 24 a second", "1 region with boxes left out"),
    ),
    "Label Studio predictions": Sample(
        "ls.json", dumped([{"data": {"video": "a.mp4", "fps": 10}, "annotations": [], "predictions": [{"result": [
            {"type": "timelinelabels", "value": {"ranges": [{"start": 11, "end": 20}], "timelinelabels": ["Sit"]}},
        ]}]}]),
        {"a": (NONE, None, [(1.0, 2.0, "Sit")])}, ("1 task without an annotation: what was predicted is read",),
    ),
    "Label Studio JSON-MIN with a video without a region": Sample(
        "min.json", dumped([
            {"id": 1, "video": "w.mp4", "annotator": 1, "annotation_id": 1},
            {"id": 2, "video": "x.mp4", "annotator": 1, "annotation_id": 2,
             "videoLabels": [{"ranges": [{"start": 11, "end": 20}], "timelinelabels": ["Sit"]}]},
            {"id": 2, "video": "x.mp4", "annotator": 2, "annotation_id": 3,
             "videoLabels": [{"ranges": [{"start": 1, "end": 20}], "timelinelabels": ["Sit"]}]},
        ]),
        {"w": (NONE, None, []), "x": (NONE, None, [(1.0, 2.0, "Sit"), (0.0, 2.0, "Sit")])},
        ("1 video of several tasks or annotators",), FormatOptions(fps=10),
    ),
    "VIA 3": Sample(
        "via.json", dumped(VIA), {"egg": (NONE, None, [(1.25, 3.5, "break egg"), (4.0, 4.0, "smoke")])},
        ("1 entry with a region", "1 segment without a label"),
    ),
    "VIA 3 of a video on a server": Sample(
        "via.json", dumped(VIA).replace("egg.mp4", "https://host/v/egg.mp4?token=1#t=3"),
        {"egg": (NONE, None, [(1.25, 3.5, "break egg"), (4.0, 4.0, "smoke")])},
    ),
    "VIA 3 attribute": Sample(
        "via.json", dumped(VIA), {"egg": (NONE, None, [(4.0, 4.0, "smoke")])}, options=FormatOptions(label="comment"),
    ),
    "VIA 3 ticked boxes": Sample(
        "via.json", dumped({**VIA, "attribute": {"1": {"aname": "who", "type": 2, "options": {"0": "ann", "1": "bob"}}},
                            "metadata": {"1_a": {"vid": "1", "z": [1, 2], "xy": [], "av": {"1": "0,1"}}}}),
        {"egg": (NONE, None, [(1.0, 2.0, "ann"), (1.0, 2.0, "bob")])},
    ),
    "VIA 3 CSV": Sample("via.csv", VIA_CSV, {"egg": (NONE, None, [(1.25, 3.5, "break egg")])}),
    "VIA 3 CSV that a spreadsheet has changed": Sample(
        "via.csv", VIA_CSV.replace("# ATTRIBUTE", '"# ATTRIBUTE').replace('"B"', '"0"').replace('""B""', '""0""'),
        {"egg": (NONE, None, [(1.25, 3.5, "0")])}, ("its line ATTRIBUTE is gone or changed",),
    ),
    "VIA 3 CSV of before": Sample(
        "via.csv",
        "# Exported using VGG Image Annotator\n"
        "# CSV_HEADER = metadata_id,\tfile_list,\ttemporal_segment_start,\ttemporal_segment_end,\tmetadata\n"
        '1_a\t["egg.mp4"]\t1.25\t3.5\t{"1":"crack"}\n'.replace('["egg.mp4"]', '"[""egg.mp4""]"').replace(
            '{"1":"crack"}', '"{""1"":""crack""}"'),
        {"egg": (NONE, None, [(1.25, 3.5, "crack")])},
    ),
    "CVAT": Sample(
        "cvat.xml", CVAT, {"yard": (NONE, None, [(1.0, 3.0, "dog"), (6.0, 6.4, "dog")])}, options=FormatOptions(fps=10),
    ),
    "CVAT of two tasks on one video": Sample(
        "cvat.xml", CVAT.replace("</task>", "</task><task><id>4</id><source>yard.mp4</source></task>").replace(
            "</annotations>", '<track id="0" label="cat" task_id="4"><box frame="10"/></track></annotations>'),
        {"yard": (NONE, None, [(1.0, 3.0, "dog"), (6.0, 6.4, "dog"), (1.0, 1.1, "cat")])},
        ("the segments of 1 video come from several tasks and are put together (yard)",), FormatOptions(fps=10),
    ),
    "CVAT attribute": Sample(
        "cvat.xml", CVAT, {"yard": (NONE, None, [(1.0, 2.0, "sit"), (2.0, 3.0, "run"), (6.0, 6.4, "run")])},
        options=FormatOptions(fps=10, label="state"),
    ),
    "CVAT skeleton": Sample(
        "cvat.xml", "<annotations><meta><source>yard.mp4</source></meta><track id='0' label='biker'>" + "".join(
            f"<skeleton frame='{frame}' keyframe='1' z_order='0'>"
            + "".join(f"<points label='{part}' outside='{outside}' points='1,1'/>" for part in (1, 2)) + "</skeleton>"
            for frame, outside in ((0, 0), (10, 1), (30, 0), (31, 0))
        ) + "</track></annotations>",
        {"yard": (NONE, None, [(0.0, 1.0, "biker"), (3.0, 3.2, "biker")])}, options=FormatOptions(fps=10),
    ),
    "CVAT without a label": Sample(
        "cvat.xml", "<annotations><version>1.1</version><meta><task><id>3</id><name>n</name><source>yard.mp4</source>"
        "</task></meta></annotations>", {"yard": (NONE, None, [])},
    ),
    "CVAT images": Sample(
        "cvat.xml", "<annotations><meta><source>yard.mp4</source></meta>"
        + "".join(f'<image id="{i}" name="f{i}"><tag label="rain"/></image>' for i in (0, 1, 2, 5))
        + '<image id="6" name="f6"><box label="dog"/></image></annotations>',
        {"yard": (NONE, None, [(0.0, 0.3, "rain"), (0.5, 0.6, "rain")])},
        ("1 image with shapes and without a tag left out",), FormatOptions(fps=10),
    ),
    "CholecT50": Sample(
        "VID01.json", dumped(CHOLECT50),
        {"VID01": (NONE, 4.0, [
            (0.0, 2.0, "grasper,grasp,gallbladder"), (3.0, 4.0, "grasper,grasp,gallbladder"),
            (1.0, 2.0, "hook,grasp,gallbladder"),
        ])},
    ),
    "CholecT50 phase": Sample(
        "VID01.json", dumped(CHOLECT50), {"VID01": (NONE, 4.0, [(0.0, 4.0, "preparation")])},
        options=FormatOptions(label="phase"),
    ),
    "Cholec80 phase": Sample(
        "video01-phase.txt", "Frame\tPhase\n" + "".join(f"{i}\t{'Cut' if i < 50 else 'Clean'}\n" for i in range(75)),
        {"video01": (NONE, 3.0, [(0.0, 2.0, "Cut"), (2.0, 3.0, "Clean")])},
    ),
    "Cholec80 tools": Sample(
        "video01-tool.txt", "Frame\tHook\tClipper\n0\t1\t0\n25\t1\t1\n50\t0\t1\n",
        {"video01": (NONE, 3.0, [(0.0, 2.0, "Hook"), (1.0, 3.0, "Clipper")])},
    ),
    "frame-wise": Sample(
        "P03_milk.txt", FRAMES, {"P03_milk": (NONE, 0.7, [(0.2, 0.5, "take_cup"), (0.5, 0.6, "pour_milk")])},
        ("3 frames of SIL dropped as background",), FormatOptions(fps=10),
    ),
    "frame-wise with splits": Sample(
        "groundTruth/P03_milk.txt", FRAMES,
        {"P03_milk": (TRAIN, 0.7, [(0.2, 0.5, "take_cup"), (0.5, 0.6, "pour_milk")])}, options=FormatOptions(fps=10),
        beside=(("splits/train.split1.bundle", "P03_milk.txt\n"), ("splits/test.split1.bundle", "P04_milk.txt\n")),
    ),
    "runs of frames": Sample(
        "P03_milk.txt", "1-30 SIL  \n31-150 take_bowl  \n151-160 SIL\n",
        {"P03_milk": (NONE, 16.0, [(3.0, 15.0, "take_bowl")])}, options=FormatOptions(fps=10),
    ),
    "EPIC verb": Sample(
        "EPIC_100_train.csv", EPIC, {"P01_1": (TRAIN, None, [
            (1.5, 2.75, "take"), (60.0, 3662.5, "take"), (120.0, 121.0, "take")])}, ("the subset training", "verbs"),
    ),
    "EPIC action": Sample(
        "EPIC_100_validation.csv", EPIC, {"P01_1": (VAL, None, [
            (1.5, 2.75, "take plate"), (60.0, 3662.5, "take plate"), (120.0, 121.0, "take lid")])},
        options=FormatOptions(label="action"),
    ),
    "EPIC noun by its lists": Sample(
        "EPIC_100_validation.csv", EPIC, {"P01_1": (VAL, 4000.0, [
            (1.5, 2.75, "dish"), (60.0, 3662.5, "dish"), (120.0, 121.0, "cover")])},
        options=FormatOptions(label="noun"),
        beside=(("EPIC_100_noun_classes.csv", "id,key,instances,category\n2,dish,['plate'],x\n5,cover,['lid'],x\n"),
                ("EPIC_100_video_info.csv", "video_id,duration,fps,resolution\nP01_1,4000.0,60,1x1\n")),
    ),
    "EPIC test": Sample(
        "EPIC_100_test_timestamps.csv", "narration_id,participant_id,video_id,start_timestamp,stop_timestamp\n"
        "P01_9_0,P01,P01_9,00:00:01.00,00:00:02.00\n", {"P01_9": (TEST, None, [])},
    ),
    "EPIC-SOUNDS": Sample(
        "EPIC_Sounds_validation.csv", "annotation_id,participant_id,video_id,start_timestamp,stop_timestamp,"
        "start_sample,stop_sample,description,class,class_id\n"
        "P01_9_0,P01,P01_9,00:00:01.250,00:00:02.500,30000,60000,clang / clatter,metal / wood collision,10\n",
        {"P01_9": (VAL, None, [(1.25, 2.5, "metal / wood collision")])}, ("read as EPIC-SOUNDS", "its classes"),
    ),
    "Ego4D": Sample(
        "moments_val.json", dumped(EGO4D), {"c": (VAL, 480.0, [(1.5, 4.0, "use_phone")])}, ("1 label that are not",),
    ),
    "SoccerNet": Sample(
        "Labels-v2.json", dumped(SOCCER), {
            f"{GAME}/1": (NONE, None, [(5.125, 5.125, "Kick-off")]),
            f"{GAME}/2": (NONE, None, [(2700.0, 2700.0, "Goal")]),
        },
    ),
    "SoccerNet 1": Sample(
        "Labels.json", dumped({**SOCCER, "annotations": [{"gameTime": "2 - 12:21", "label": "soccer-ball"}]}),
        {f"{GAME}/2": (NONE, None, [(741.0, 741.0, "soccer-ball")])},
    ),
    "OpenSportsLab 2": Sample(
        "osl.json", dumped(OSL), {"game1/224p": (VAL, None, [(1.24, 1.24, "PASS")]), "game2/224p": (VAL, None, [])},
    ),
    "OpenSportsLab 2 whose metadata tell the split": Sample(
        "osl.json", dumped({"version": "2.0", "metadata": {"split": "test"}, "data": [
            {"inputs": [{"type": "video", "path": "x/224p.mp4", "fps": 25.0}],
             "events": [{"head": "ball_action", "label": "PASS", "position_ms": "840"}]},
        ]}),
        {"224p": (TEST, None, [(0.84, 0.84, "PASS")])}, ("subsets by split",),
    ),
    "OpenSportsLab 2 of several heads": Sample(
        "osl.json", dumped(OSL_HEADS), {
            "a": (TRAIN, None, [(1.24, 1.24, "PASS")]), "b": (TRAIN, None, []), "c": (TEST, None, []),
        },
        ("2 events of other heads than --label action dropped", "subsets by split"), FormatOptions(label="action"),
    ),
    "OpenSportsLab 2 of all heads": Sample(
        "osl.json", dumped(OSL_HEADS), {
            "a": (TRAIN, None, [(1.24, 1.24, "PASS"), (1.24, 1.24, "left")]),
            "b": (TRAIN, None, [(2.0, 2.0, "right")]), "c": (TEST, None, []),
        },
        ("the heads action, team are put together",),
    ),
    "OpenSportsLab 1": Sample("osl.json", dumped(OSL_1), {"720p": (NONE, None, [(0.5, 0.5, "PASS")])}),
    "E2E-Spot": Sample("val.json", dumped(SPOT), {"rally": (VAL, 4.0, [(2.0, 2.0, "serve")])}),
    "MultiTHUMOS": Sample(
        "multithumos.json", dumped(ACTIONS),
        {"v1": (TRAIN, 20.5, [(1.0, 2.5, "0"), (1.5, 9.0, "4")]), "v2": (TEST, 10.0, [])}, ("2 classes have no name",),
    ),
    "MultiTHUMOS with names": Sample(
        "multithumos.json", dumped(ACTIONS),
        {"v1": (TRAIN, 20.5, [(1.0, 2.5, "Run"), (1.5, 9.0, "Throw far")]), "v2": (TEST, 10.0, [])},
        beside=(("class_list.txt", "0 Run\n4 Throw far\n"),),
    ),
    "Charades": Sample(
        "Charades_v1_train.csv", CHARADES,
        {"46GP8": (TRAIN, 24.83, [(11.9, 21.2, "Cook"), (0.0, 12.6, "c147")]), "N11GT": (TRAIN, 18.33, [])},
        beside=(("Charades_v1_classes.txt", "c092 Cook\n"),),
    ),
    "Charades with an action that ends before it starts": Sample(
        "Charades_v1_train.csv", CHARADES.replace("c147 0.00 12.60", "c147 12.60 0.00"),
        {"46GP8": (TRAIN, 24.83, [(11.9, 21.2, "c092")]), "N11GT": (TRAIN, 18.33, [])},
        ("1 action dropped: the end is before the start",),
    ),
    "MultiTHUMOS with an action that ends before it starts": Sample(
        "charades.json", dumped({**ACTIONS, "v2": {**ACTIONS["v2"], "actions": [[113, 38.0, 13.0]]}}),
        {"v1": (TRAIN, 20.5, [(1.0, 2.5, "0"), (1.5, 9.0, "4")]), "v2": (TEST, 10.0, [])},
        ("1 action dropped: the end is before the start", "2 classes have no name"),
    ),
    "HACS clips": Sample(
        "HACS_clips.csv", HACS,
        {"abc": (TRAIN, None, [(1.0, 3.0, "Archery")]), "def": (VAL, None, [(0.0, 2.0, "Archery")])},
        ("1 clip without the action",),
    ),
    "HACS clips of which the labels are kept back": Sample(
        "HACS_clips.csv", HACS + ",ghi,testing,,,\n",
        {"abc": (TRAIN, None, [(1.0, 3.0, "Archery")]), "def": (VAL, None, [(0.0, 2.0, "Archery")]),
         "ghi": (TEST, None, [])},
    ),
    "THUMOS class": Sample(
        "BaseballPitch_val.txt", "video_validation_0000266  72.8 76.4 \nvideo_test_0000001 1.0 2.0\n",
        {"video_validation_0000266": (TRAIN, None, [(72.8, 76.4, "BaseballPitch")]),
         "video_test_0000001": (TEST, None, [(1.0, 2.0, "BaseballPitch")])},
    ),
    "TRACE": Sample(
        "trial_final.csv",
        "# trace-meta: behaviors=groom:g\nlabelId,timestamp,endTimestamp\ngroom,0.0,2.0\nrear,40.5,42.0\n",
        {"trial": (NONE, None, [(0.0, 2.0, "groom"), (40.5, 42.0, "rear")])},
    ),
    "SubRip": Sample(
        "new.srt", "1\n00:00:01,500 --> 00:00:03,000\nrun 0.87\n\n2\n00:01:00,000 --> 01:00:00,250\nhigh jump\n",
        {"new": (NONE, None, [(1.5, 3.0, "run"), (60.0, 3600.25, "high jump")])},
    ),
    "SubRip without fractions, spaces and empty lines": Sample(
        "new.srt", "1\n00:00:01-->00:00:03\nrun\n2\n0:05,0004 --> 0:06\nhigh\njump\n",
        {"new": (NONE, None, [(1.0, 3.0, "run"), (5.0004, 6.0, "high jump")])},
    ),
    "WebVTT": Sample(
        "new.vtt", "WEBVTT\n\n00:01.500 --> 00:03.000 align:start\n<v Ann>run &amp; jump\n",
        {"new": (NONE, None, [(1.5, 3.0, "run & jump")])},
    ),
    "blank cells behind": Sample(
        "t.csv", "video;start;end;label;;\na;1,0;2,5;run;;\nb;;;;;\nc;1;2;hop\n",
        {"a": (NONE, None, [(1.0, 2.5, "run")]), "b": (NONE, None, []), "c": (NONE, None, [(1.0, 2.0, "hop")])},
    ),
    "colons": Sample("t.csv", "video:start:end:label\na:1.0:2.5:run\n", {"a": (NONE, None, [(1.0, 2.5, "run")])}),
}  # fmt: skip
