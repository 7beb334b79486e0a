-- What a project has spent is summed over the runs of it that chats follow, at every look at one of them.
--
-- Forward only; the release before works on this schema. What an operator has to expect: one transaction, a second per million chats' runs,
-- in which no chat begins to follow a run. Gives up after five seconds of waiting for a lock; nothing was changed then, run it again.
set local lock_timeout = '5s';

create index telegram_runs_project on telegram_runs (project_id);
