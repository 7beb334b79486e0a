-- Old runs leave the database for files.
--
-- `history` has a partition for every month of UTC by the time inside the run id: `history_2026_11` holds the runs whose ids are of
-- November 2026. Workers make them ahead of time (engine/src/store/partitions.rs); what no partition takes lies in `history_default`.
-- `archives` has a row for every file that retired runs were written to: it is inserted in the transaction that deletes
-- them, so a run is in the database, or in a file that is whole and recorded. `archived_runs` says in which.

create table archives (
  id uuid primary key,
  file text not null constraint archives_file_key unique,  -- its name, without the folder: that may move
  sha256 bytea not null check (octet_length(sha256) = 32), -- of the file as it lies there
  bytes bigint not null check (bytes > 0),
  runs int not null check (runs > 0),
  closed_before timestamptz not null,   -- its runs had closed before
  made_at timestamptz not null default engine_now()
);
create index archives_made_at on archives (made_at);

-- The row stays when the run is imported again; a second archive of it takes the row over.
create table archived_runs (
  shard smallint not null, run_id uuid not null,
  archive_id uuid not null references archives,
  primary key (shard, run_id)
);

-- A database with runs: what is there becomes one partition that ends with this month, so that `history_default` is empty and
-- partitions can be made beside it. Reads all of `history` once and locks it meanwhile: to be done in a quiet hour.
do $$
declare
  month timestamp := date_trunc('month', engine_now() at time zone 'UTC');
  here uuid;
  beyond uuid;
begin
  if exists (select from history) then
    month := month + interval '1 month';
    here := (lpad(to_hex((extract(epoch from month) * 1000)::bigint), 12, '0') || repeat('0', 20))::uuid;
    alter table history detach partition history_default;
    alter table history_default rename to history_before;
    alter index history_default_pkey rename to history_before_pkey;
    create table history_default partition of history default;
    with later as (delete from history_before where run_id >= here returning *)
      insert into history_default select * from later;
    execute format('alter table history attach partition history_before for values from (minvalue) to (%L)', here);
  end if;
  for n in 0..2 loop
    here := (lpad(to_hex((extract(epoch from month) * 1000)::bigint), 12, '0') || repeat('0', 20))::uuid;
    beyond := (lpad(to_hex((extract(epoch from month + interval '1 month') * 1000)::bigint), 12, '0') || repeat('0', 20))::uuid;
    -- Runs of a clock that is ahead, or of an instant to come.
    if not exists (select from history_default where run_id >= here and run_id < beyond) then
      execute format('create table %I partition of history for values from (%L) to (%L)',
                     'history_' || to_char(month, 'YYYY_MM'), here, beyond);
    end if;
    month := month + interval '1 month';
  end loop;
end $$;
