BEGIN TRANSACTION;
CREATE TABLE calls (
    key TEXT NOT NULL UNIQUE, primitive TEXT NOT NULL, site TEXT NOT NULL, prompt_tokens INTEGER NOT NULL,
    completion_tokens INTEGER NOT NULL, seconds REAL NOT NULL, checksum INTEGER NOT NULL, fingerprint TEXT NOT NULL,
    answer BLOB NOT NULL, call TEXT NOT NULL
);
INSERT INTO "calls" VALUES('key-a','generate','site',3,2,0.5,882877872,'model',X'7B2274657874223A225AC3BC7269636820EDA080227D','{"q":"wo?"}');
INSERT INTO "calls" VALUES('key-b','generate','site',4,1,0.25,2296677988,'model',X'7B2274657874223A226E6963687473227D','{"q":"was?"}');
CREATE TABLE counters (name TEXT PRIMARY KEY, value INTEGER NOT NULL) WITHOUT ROWID;
INSERT INTO "counters" VALUES('cached',4);
CREATE TABLE embeddings (
    key TEXT NOT NULL UNIQUE, fingerprint TEXT NOT NULL, checksum INTEGER NOT NULL, vector BLOB NOT NULL,
    text BLOB NOT NULL
);
INSERT INTO "embeddings" VALUES('key-e','emb',1269575949,X'0000003F000080BE',X'4261756D');
CREATE TABLE events (
    step INTEGER NOT NULL REFERENCES steps (number), position INTEGER NOT NULL, kind TEXT NOT NULL,
    ok INTEGER NOT NULL, payload TEXT NOT NULL, PRIMARY KEY (step, position)
) WITHOUT ROWID;
INSERT INTO "events" VALUES(0,0,'write',1,'{"after":"eins","key":"taste","kind":"write","ok":true,"owner":"user:ü","step":0}');
INSERT INTO "events" VALUES(1,0,'write',0,'{"after":"zwei","key":"taste","kind":"write","ok":false,"owner":"user:ü","step":1}');
INSERT INTO "events" VALUES(3,0,'write',1,'{"after":"vier","key":"taste","kind":"write","ok":true,"owner":"item:1","step":3}');
CREATE TABLE failures (
    id INTEGER PRIMARY KEY, key TEXT NOT NULL, site TEXT NOT NULL, kind TEXT NOT NULL, message BLOB NOT NULL
);
INSERT INTO "failures" VALUES(1,'key-f','site','MalformedOutput',X'6C656572');
CREATE TABLE memory (
    owner BLOB NOT NULL, key BLOB NOT NULL, version INTEGER NOT NULL, step INTEGER NOT NULL, text BLOB NOT NULL,
    PRIMARY KEY (owner, key)
) WITHOUT ROWID;
INSERT INTO "memory" VALUES(X'6974656D3A31',X'7461737465',1,3,X'76696572');
INSERT INTO "memory" VALUES(X'757365723AC3BC',X'7461737465',2,1,X'7A776569');
CREATE TABLE run (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
INSERT INTO "run" VALUES('config','{"seed":7}');
INSERT INTO "run" VALUES('digest','1c4b64ea3369be7613c0114d36bb4b9d58bdd52f8caff9b1291a373fc2de39f0');
INSERT INTO "run" VALUES('last_step','1');
CREATE TABLE steps (number INTEGER PRIMARY KEY, digest TEXT NOT NULL);
INSERT INTO "steps" VALUES(0,'9611ca58f9d767be25b08fbb3ef1624b8ee241f0a283244e2e51e76d45f91374');
INSERT INTO "steps" VALUES(1,'df85b6cc228a964591ef1f6a3a1413f6d1f48c0bb4aff1569b7e77b11f47e91e');
INSERT INTO "steps" VALUES(3,'ab7bae1033606df78c26dc24cede40079bda23c9cac7f7e1bbee02819fa2384f');
CREATE INDEX events_not_ok ON events (step) WHERE ok = 0;
COMMIT;
PRAGMA user_version = 1;
