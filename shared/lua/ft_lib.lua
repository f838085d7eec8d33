-- Common ground of the scripts for fine-tunes; shared/scripts.py puts it behind lib.lua.
-- A job's units are 'job', held while it is validated or trained, and the step of each checkpoint
-- that shall be served. Fields of its hash: `record` is JSON that only the holder of 'job' changes;
-- state, wanted, stage, attempts, token, waiting_for and finished_at are plain, since scripts need them.
local JOB = 'job'
local FT_LANES = { validating_files = 'finetune/validate', queued = 'finetune/train' }
local FT_CHECKPOINTS = 'finetune/checkpoint'

-- Events that a script itself added; answered, so that they are written to shared storage, too.
local told = {}

-- An event counts once, whoever sends it how often.
local function ft_push(id, event_key, text)
  if redis.call('SADD', key(id, 'seen'), event_key) == 0 then return end
  redis.call('RPUSH', key(id, 'events'), text)
end

local function ft_tell(id, level, message)
  local ms = now_ms()
  local event = { key = 'script:' .. ms .. ':' .. redis.call('LLEN', key(id, 'events')),
    at_ms = ms, level = level, type = 'message', message = message }
  local text = cjson.encode(event)
  ft_push(id, event.key, text)
  told[#told + 1] = text
end

local function ft_is_terminal(state)
  return next(FINETUNE_TRANSITIONS[state]) == nil
end

-- Jobs that have not ended are in the set of their state and use their files.
local function ft_enter_state(id, state, ended_at)
  local users = cjson.decode(field(id, 'uses'))
  if not ft_is_terminal(state) then
    redis.call('SADD', P .. 'finetune_state:' .. state, id)
    for _, used in ipairs(users) do redis.call('SADD', P .. 'users:' .. used, id) end
    return
  end
  redis.call('HSET', key(id), 'finished_at', ended_at)
  redis.call('HDEL', key(id), 'waiting_for')
  redis.call('ZADD', P .. 'finetunes_ended', ended_at, id)
  for _, used in ipairs(users) do redis.call('SREM', P .. 'users:' .. used, id) end
end

-- The only place that changes a state. Answers whether it did.
local function ft_transition(id, to, at)
  local from = field(id, 'state')
  if not from or not FINETUNE_TRANSITIONS[from][to] then return false end
  redis.call('HSET', key(id), 'state', to)
  redis.call('SREM', P .. 'finetune_state:' .. from, id)
  if to ~= 'running' then redis.call('HDEL', P .. 'finetune_steps', id) end
  ft_enter_state(id, to, at)
  if ft_is_terminal(to) then count(1, 'vlmq_finetunes_ended_total', to) end
  return true
end

-- The lane in which a job that nobody holds waits, if its state is one of waiting.
local function ft_place(id)
  local lane = not holder(id, JOB) and FT_LANES[field(id, 'state')] or nil
  local before = field(id, 'lane')
  if lane == before then return end
  if before then
    drop_out(before, field(id, 'owner'), id)
    redis.call('HDEL', key(id), 'lane')
  end
  if lane then
    redis.call('HSET', key(id), 'lane', lane)
    line_up(lane, field(id, 'owner'), id)
  end
end

-- What is wanted comes true as soon as nobody holds the job.
local function ft_settle(id, at)
  if not holder(id, JOB) then
    local state, wanted = field(id, 'state'), field(id, 'wanted')
    if state == 'running' then
      ft_transition(id, 'queued', at)
      state = 'queued'
    end
    if wanted == 'cancel' and ft_transition(id, 'cancelled', at) then
      ft_tell(id, 'info', 'Cancelled; its checkpoints are kept')
    elseif wanted == 'pause' and ft_transition(id, 'paused', at) then
      redis.call('HDEL', key(id), 'waiting_for')
      ft_tell(id, 'info', 'Paused; when it is resumed it goes on from its last checkpoint')
    elseif wanted == 'run' and state == 'paused' then
      ft_transition(id, field(id, 'stage') == 'validate' and 'validating_files' or 'queued', at)
      ft_tell(id, 'info', 'Resumed; it waits for a worker')
    end
  end
  ft_place(id)
end

-- Whether a unit may be claimed by now.
local function ft_is_due(id, unit, now)
  return tonumber(redis.call('HGET', key(id, 'delays'), unit) or 0) <= now
end

-- A member of a lane is a job's id, or id|step for a checkpoint.
local function ft_unit(member)
  local id, step = string.match(member, '^([^|]+)|?(.*)$')
  return id, step ~= '' and step or JOB
end
