-- The tables of the engine on Citus: what is distributed, what is everywhere, what stays on the coordinator, and which constraints
-- change. For a new, migrated database without runs, as its owner:
--
--   psql "$DATABASE_URL" -v ON_ERROR_STOP=1 -f deploy/citus.sql
--
-- NOT TRIED: this repository is built and tested on plain Postgres, where there is no Citus. What is tested is the
-- precondition (engine/tests/it/citus.rs): every statement that a run's steps send names the shard of every row that it
-- touches, but for a list of exceptions, each with how often it is sent; and that every table of the engine is
-- named here once. What has to change in the program before it runs on Citus stands in RUNBOOK.md, "Citus". Written for the
-- documentation of Citus 12.

create extension if not exists citus;

-- A unique constraint of a distributed table must hold the distribution column.
-- `place` is given under the lock of its group's row, so that two runs do not get one; what goes is the second lock on that door.
alter table admissions drop constraint admissions_place_key;
create index admissions_place on admissions (group_name, place);
-- The same of chains: the row of the run before is locked when the next one is made, and says that it has been.
drop index runs_continued_from;
create index runs_continued_from on runs (continued_from) where continued_from is not null;
drop index runs_chain_open;
create index runs_chain_open on runs (first_run_id) where first_run_id is not null and closed_at is null;
-- Nobody looks for a row of `outbox` by `id` alone. Citus gives each node a range of its own: ids are unique and in no order.
alter table outbox drop constraint outbox_pkey, add primary key (shard, id);

-- On every node, because distributed tables refer to them or are joined with them. Written at deployments and by retention: seldom.
select create_reference_table('definitions');
select create_reference_table('definition_pointers');
select create_reference_table('archives');

-- Runs and what belongs to them, a run's rows on one node. `shard` has 128 values: more nodes than that have nothing to do.
-- `history` is distributed with its partitions; those that workers attach later are distributed as they are attached.
-- The GIN index on `runs.attributes` is one a shard: a list of runs asks all of them.
select create_distributed_table('runs', 'shard', shard_count := 32);
select create_distributed_table('history', 'shard', colocate_with := 'runs');
select create_distributed_table('inbox', 'shard', colocate_with := 'runs');
select create_distributed_table('checkpoints', 'shard', colocate_with := 'runs');
select create_distributed_table('attempt_progress', 'shard', colocate_with := 'runs');
select create_distributed_table('ready', 'shard', colocate_with := 'runs');
select create_distributed_table('admissions', 'shard', colocate_with := 'runs');
select create_distributed_table('outbox', 'shard', colocate_with := 'runs');
select create_distributed_table('archived_runs', 'shard', colocate_with := 'runs');
select create_distributed_table('blobs', 'shard', colocate_with := 'runs');
select create_distributed_table('former_definitions', 'shard', colocate_with := 'runs');

-- On the coordinator: what must be unique, or is locked, over all runs (a business key, a group's row, a rate, the turn of a
-- schedule), and the workers themselves. None is touched by a step.
select citus_add_local_table_to_metadata('workflow_ids');
select citus_add_local_table_to_metadata('concurrency_groups');
select citus_add_local_table_to_metadata('rate_limits');
select citus_add_local_table_to_metadata('schedules');
select citus_add_local_table_to_metadata('schedule_actions');
select citus_add_local_table_to_metadata('workers');
select citus_add_local_table_to_metadata('dead_workers');

-- Called inside statements that go to the nodes.
select create_distributed_function('engine_now()');
