-- Common ground of all scripts; shared/scripts.py puts it in front of each.
-- A "unit" is a piece of work that one worker may hold: 'plan', 'final' or a chunk's number.
-- A "lane" is where batches with work for one kind of worker wait, by owner.
local P = 'vlmq:'
local TRANSITIONS = cjson.decode([==[@TRANSITIONS@]==])
local FINETUNE_TRANSITIONS = cjson.decode([==[@FINETUNE_TRANSITIONS@]==])
local CONTROL = 'control'
local MAX_PROBLEMS = 100

local function now_ms()
  local t = redis.call('TIME')
  return tonumber(t[1]) * 1000 + math.floor(tonumber(t[2]) / 1000)
end

-- Batches and fine-tunes are told apart by their ids, and have their leases listed apart.
local function of_kind(id, batch, finetune)
  return P .. (string.sub(id, 1, 6) == 'ftjob-' and finetune or batch)
end

local function key(id, part)
  local name = of_kind(id, 'batch:', 'finetune:') .. id
  if part then return name .. ':' .. part end
  return name
end

local function field(id, name)
  local value = redis.call('HGET', key(id), name)
  if value == false or value == '' then return nil end
  return value
end

-- Count an event in the metric's field of the hash that shared/metrics.py describes.
local function count(by, ...)
  if tonumber(by) ~= 0 then
    redis.call('HINCRBY', P .. 'metrics', table.concat({ ... }, '|'), by)
  end
end

local function is_terminal(state)
  return next(TRANSITIONS[state]) == nil
end

-- Batches that have not ended are in the set of their state.
local function enter_state(id, state)
  if not is_terminal(state) then redis.call('SADD', P .. 'state:' .. state, id) end
end

-- A lane has its owners in turn, and each owner's members in turn.
local function line_up(lane, owner, member)
  local owners = P .. 'owners:' .. lane
  redis.call('LPUSH', P .. 'lane:' .. lane .. '|' .. owner, member)
  if not redis.call('LPOS', owners, owner) then redis.call('LPUSH', owners, owner) end
end

local function drop_out(lane, owner, member)
  local queue = P .. 'lane:' .. lane .. '|' .. owner
  redis.call('LREM', queue, 0, member)
  if redis.call('EXISTS', queue) == 0 then
    redis.call('LREM', P .. 'owners:' .. lane, 0, owner)
  end
end

local function leave_lane(id)
  local lane = field(id, 'lane')
  if not lane then return end
  drop_out(lane, field(id, 'owner'), id)
  if redis.call('EXISTS', P .. 'owners:' .. lane) == 0 then
    redis.call('SREM', P .. 'lanes', lane)
  end
  redis.call('HDEL', key(id), 'lane')
end

local function enter_lane(id, lane)
  leave_lane(id)
  redis.call('HSET', key(id), 'lane', lane, 'touched', now_ms())
  line_up(lane, field(id, 'owner'), id)
  redis.call('SADD', P .. 'lanes', lane)
end

-- A set of images is synced by one batch at a time. Answers which other one has it, if one does.
local function take_set(id, set)
  if set == '' then return nil end
  local name = P .. 'syncing:' .. set
  local other = redis.call('GET', name)
  if other and other ~= id then
    local state = field(other, 'state')
    if state and not is_terminal(state) then return other end
  end
  redis.call('SET', name, id)
  redis.call('HSET', key(id), 'syncs', set)
  return nil
end

local function leave_set(id)
  local set = field(id, 'syncs')
  if set and redis.call('GET', P .. 'syncing:' .. set) == id then
    redis.call('DEL', P .. 'syncing:' .. set)
  end
end

-- The only place that changes a state. Answers whether it did.
local function transition(id, to)
  local from = field(id, 'state')
  if not from or not TRANSITIONS[from][to] then return false end
  local at = math.floor(now_ms() / 1000)
  redis.call('HSET', key(id), 'state', to, to .. '_at', at)
  redis.call('RPUSH', key(id, 'events'), cjson.encode({ at = at, from = from, to = to }))
  redis.call('SREM', P .. 'state:' .. from, id)
  enter_state(id, to)
  if is_terminal(to) then
    leave_set(id)
    count(1, 'vlmq_batches_ended_total', to)
  end
  return true
end

local function offer(id, unit, not_before_ms)
  redis.call('ZADD', key(id, 'retry'), not_before_ms, unit)
end

-- Finalize when no chunk is left to do and none will come, or when a stop was asked for and nobody
-- holds a unit.
local function settle(id)
  local state = field(id, 'state')
  if state ~= 'in_progress' and state ~= 'validating' then return false end
  if redis.call('HLEN', key(id, 'leases')) > 0 then return false end
  local stopped = field(id, 'stop_reason')
  local done = state == 'in_progress' and not field(id, 'listing')
    and tonumber(field(id, 'committed') or 0) >= tonumber(field(id, 'chunks') or 0)
  if not stopped and not done then return false end
  transition(id, 'finalizing')
  redis.call('DEL', key(id, 'retry'))
  enter_lane(id, CONTROL)
  offer(id, 'final', 0)
  return true
end

-- Uploads are kept while a batch that reads them is named as their user.
local function let_go(id, files)
  for _, file in ipairs(files) do redis.call('SREM', P .. 'users:' .. file, id) end
end

local function holder(id, unit)
  local held = redis.call('HGET', key(id, 'leases'), unit)
  if not held then return nil end
  local token, worker = string.match(held, '^(%d+) (.*)$')
  return tonumber(token), worker
end

-- A new lease, under the next token of its job.
local function grant_lease(id, unit, worker, until_ms)
  local token = redis.call('HINCRBY', key(id), 'token', 1)
  local member = id .. '|' .. unit
  redis.call('HSET', key(id, 'leases'), unit, token .. ' ' .. worker)
  redis.call('ZADD', of_kind(id, 'leases', 'finetune_leases'), until_ms, member)
  redis.call('SADD', of_kind(id, 'held:', 'finetune_held:') .. worker, member)
  return token
end

local function drop_lease(id, unit)
  local _, worker = holder(id, unit)
  local member = id .. '|' .. unit
  redis.call('HDEL', key(id, 'leases'), unit)
  redis.call('ZREM', of_kind(id, 'leases', 'finetune_leases'), member)
  if worker then redis.call('SREM', of_kind(id, 'held:', 'finetune_held:') .. worker, member) end
end

-- How fast a batch is done is told from two marks, moments with what was done by then: the newer one
-- becomes the older one after half a minute, if enough was committed in it to tell anything.
local function begin_pace(id)
  local now = now_ms()
  if redis.call('HSETNX', key(id), 'started_ms', now) == 0 then return end
  local done = (field(id, 'completed') or 0) + (field(id, 'failed') or 0)
  redis.call('HSET', key(id), 'started_done', done, 'from_ms', now, 'from_done', done, 'mark_ms', now, 'mark_done', done,
    'mark_commits', field(id, 'committed') or 0)
end

local function mark_pace(id)
  local now, mark = now_ms(), field(id, 'mark_ms')
  redis.call('HSET', key(id), 'committed_ms', now)
  if not mark or now - mark < 30000 then return end
  local commits = field(id, 'committed')
  if commits - field(id, 'mark_commits') < 8 then return end
  redis.call('HSET', key(id), 'from_ms', mark, 'from_done', field(id, 'mark_done'), 'mark_ms', now,
    'mark_done', field(id, 'completed') + field(id, 'failed'), 'mark_commits', commits)
end

local function holds(id, unit, token)
  return holder(id, unit) == tonumber(token)
end

-- What a batch adds to its lane's units that wait and that are held, and to the lane's batches that
-- wait by age ("created") and by when something of them was last taken ("touched"). Every script
-- that changes a batch ends with it. Asking is then one look per lane, however many batches there are.
local function recount(id)
  local lane, state = field(id, 'lane'), field(id, 'state')
  local waiting, held = 0, 0
  if lane then
    held = redis.call('HLEN', key(id, 'leases'))
    if state == 'finalizing' or not field(id, 'stop_reason') then
      waiting = redis.call('ZCARD', key(id, 'retry'))
      if state == 'in_progress' then
        waiting = waiting + tonumber(field(id, 'chunks')) - tonumber(field(id, 'next'))
      end
    end
  end
  local function change(of, by_waiting, by_held)
    redis.call('HINCRBY', P .. 'waiting', of, by_waiting)
    redis.call('HINCRBY', P .. 'held', of, by_held)
  end
  local before = field(id, 'counted_in')
  if before then
    change(before, -tonumber(field(id, 'counted_waiting')), -tonumber(field(id, 'counted_held')))
    if before ~= lane or waiting == 0 then
      redis.call('ZREM', P .. 'created:' .. before, id)
      redis.call('ZREM', P .. 'touched:' .. before, id)
    end
  end
  if not lane then
    redis.call('HDEL', key(id), 'counted_in', 'counted_waiting', 'counted_held', 'touched')
    return
  end
  change(lane, waiting, held)
  redis.call('HSET', key(id), 'counted_in', lane, 'counted_waiting', waiting, 'counted_held', held)
  if waiting > 0 then
    redis.call('ZADD', P .. 'created:' .. lane, field(id, 'created_ms') or now_ms(), id)
    redis.call('ZADD', P .. 'touched:' .. lane, field(id, 'touched') or now_ms(), id)
  end
end

-- Leases that have expired, then all that workers known to be dead hold, who then hold nothing.
-- -> members, and how many of them have expired.
local function lost_leases(expiries, held, workers)
  local lost = redis.call('ZRANGEBYSCORE', expiries, '-inf', now_ms(), 'LIMIT', 0, 1000)
  local expired = #lost
  for _, worker in ipairs(workers) do
    for _, member in ipairs(redis.call('SMEMBERS', held .. worker)) do
      lost[#lost + 1] = member
    end
    redis.call('DEL', held .. worker)
  end
  return lost, expired
end
