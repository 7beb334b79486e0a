-- Runs that went on under another definition (`run_migrated`). `runs.definition` is the one that a run has now; here stand those
-- that it had before, each with the last transition that was decided under it: a replay, a fork in the past and an export need
-- them. Rows are few: one for each migration. They go with their run.
create table former_definitions (
  shard smallint not null, run_id uuid not null,
  until_seq bigint not null check (until_seq >= 0),
  definition bytea not null references definitions,
  primary key (shard, run_id, until_seq),
  foreign key (shard, run_id) references runs on delete cascade
);
