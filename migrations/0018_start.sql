-- What a start says beyond its definition.
--
-- The table first: an index takes a weaker lock, and whoever waits for that one in the middle of a transaction would be waited for.

-- Both go along a chain, from the first run to the last.
alter table runs
  add admission jsonb,             -- place and rate that only the start named: {"place": …, "rate": …}
  add chain_deadline timestamptz;  -- no run of the chain goes on beyond it

-- The last run under an id: a start may ask how it ended (`reject_duplicate`, `allow_duplicate_failed_only`). Which run is open under an
-- id says `workflow_ids`, as before. No step changes a column of this index, so its updates stay HOT.
create index runs_workflow_id on runs (workflow_id, closed_at, run_id)
  where workflow_id is not null and imported_at is null and continued_as is null;
